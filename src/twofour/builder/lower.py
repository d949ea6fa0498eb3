"""From the fused graph to layers: each with its family, Problem, operands, weight, work, and whether 2:4 could help it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from twofour.builder.batches import default_batches
from twofour.builder.graph import Array, constant_of, is_fused
from twofour.builder.layers import Emitter
from twofour.builder.memory import Buffer
from twofour.builder.passes import fold, prepare
from twofour.builder.passes.fallback import Fallbacks
from twofour.builder.storage import Place, Storage
from twofour.errors import UnsupportedError
from twofour.exchange.importer import prepare_model
from twofour.exchange.inspect import parse_onnx_file
from twofour.kernels.operands import DTYPE_BYTES
from twofour.pattern import count_groups

LARGEST = {"fp16": 65504.0, "bf16": (2 - 2.0**-7) * 2.0**127}


@dataclass(frozen=True)
class LayerCall:
    """One step of the engine.

    Attributes:
        name: of the ONNX node it came from; several calls may share one. kind: operator of the fused graph.
        family, problem: what is to be computed, in the family's own record; `sparse` is False, choosing is the tactics' work.
        operands: the family's operand names -> names of places.
        weight: fp32, `[outputs, inputs]` or `[K, R, S, C / groups]`; None for steps without. bias: fp32 `[outputs]`.
        eligible: whether a 2:4 kernel could compute it if the weight were 2:4. is_24: whether the weight is.
        why_not_24: why it cannot run sparse as it is; empty where it can, or where there is nothing to multiply.
        flops: effective, zeros counted; 0 for a fallback, whose work is not known. num_bytes: every operand once.
    """

    name: str
    kind: str
    family: str
    problem: Any
    operands: dict[str, str]
    weight: Array | None = field(default=None, repr=False)
    bias: Array | None = field(default=None, repr=False)
    eligible: bool = False
    is_24: bool = False
    why_not_24: str = ""
    flops: int = 0
    num_bytes: int = 0


@dataclass(frozen=True)
class Lowered:
    """A network as the engine runs it for one batch size and precision.

    Attributes:
        places: place name -> where it lies. inputs, outputs: roots by position. output_values: names of the outputs' places.
        constants: root -> values in the type they are read in.
    """

    batch: int
    precision: str
    calls: tuple[LayerCall, ...]
    places: dict[str, Place]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    output_values: tuple[str, ...]
    constants: dict[str, Array] = field(repr=False)

    def buffers(self) -> list[Buffer]:
        """Return the memory that activations need, with the steps it is needed from and to; inputs, outputs and constants are elsewhere."""
        outside = {*self.inputs, *self.outputs, *self.constants}
        first: dict[str, int] = {}
        last: dict[str, int] = {}
        sizes: dict[str, int] = {}
        for step, call in enumerate(self.calls):
            for name in call.operands.values():
                place = self.places[name]
                if place.root in outside:
                    continue
                first.setdefault(place.root, step)
                last[place.root] = step
                end = (place.offset + place.elements) * DTYPE_BYTES[place.dtype]
                sizes[place.root] = max(sizes.get(place.root, 0), end)
        return [Buffer(root, sizes[root], first[root], last[root]) for root in first]

    def model(self, call: LayerCall) -> bytes:
        """Return the ONNX model of a fallback."""
        held: Any = self.constants[f"{call.operands['d0']}.model"]
        return bytes(held) if not isinstance(held, np.ndarray) else held.tobytes()


def why_dense(weight: Array) -> str:
    """Return why a weight as it is cannot run sparse: its zeros do not obey 2:4 along the input channels; empty when they do."""
    groups = count_groups(weight, weight.ndim - 1)
    if groups.is_24:
        return ""
    return f"the weight is not 2:4: {100 * groups.share:.0f} % of its groups of four have two zeros or more"


def lower(model: ir.Model, batch: int, precision: str) -> Lowered:
    """Return the layers of a graph that `prepare` has fused.

    Raises:
        UnsupportedError: a value has a type that the engine lacks, or a weight is too large for the precision.
    """
    graph = model.graph
    storage = Storage(graph)
    emitter = Emitter(storage)
    for node in graph:
        if not is_fused(node, "View"):
            emitter.emit(node)
    calls = tuple(_described(*item, emitter.places) for item in emitter.calls)
    for call in calls:
        refuse_overflow(call, precision)
    roots = {place.root for place in emitter.places.values()}
    constants = {
        str(value.name): np.asarray(value.const_value.numpy())
        for value in graph.initializers.values()
        if value.const_value is not None and str(value.name) in roots
    }
    for name, array in emitter.constants.items():
        constants[name] = array
    inputs = tuple(str(value.name) for value in graph.inputs if not value.is_initializer())
    outputs, names = [], tuple(str(value.name) for value in graph.outputs)
    for value in graph.outputs:
        place = storage.place(value)
        emitter.places.setdefault(str(value.name), place)
        outputs.append(place.root)
    return Lowered(batch, precision, calls, emitter.places, inputs, tuple(outputs), names, constants)


def refuse_overflow(call: LayerCall, precision: str) -> None:
    """Do nothing if the precision holds the layer's weight: in fp16 what is too large would become infinite.

    Raises:
        UnsupportedError: it does not.
    """
    largest = 0.0 if call.weight is None else float(np.abs(call.weight).max(initial=0.0))
    if largest > LARGEST[precision]:
        raise UnsupportedError(
            f"build: the weight of {call.name!r} holds {largest:.3g}, {precision} ends at {LARGEST[precision]:.6g}; "
            "build with another precision, or look for a batch-norm with a variance near zero"
        )


def _described(
    node: ir.Node, family: str, problem: Any, operands: dict[str, str], why_no_kernel: str, places: Mapping[str, Place]
) -> LayerCall:
    """Return the call with its weight, work and 2:4 verdict."""
    call = LayerCall(str(node.name), node.op_type, family, problem, operands)
    if family == "fallback":
        return replace(call, num_bytes=sum(prod(p.shape) * DTYPE_BYTES[p.dtype] for p in (places[name] for name in operands.values())))
    call = replace(call, flops=problem.flops)
    if family not in ("gemm", "conv"):
        return replace(call, num_bytes=problem.num_bytes)
    weight = constant_of(node.inputs[1])
    bias = constant_of(node.inputs[2]) if len(node.inputs) > 2 else None
    assert weight is not None
    reason = why_no_kernel or why_dense(weight)
    return replace(
        call,
        weight=weight,
        bias=bias,
        eligible=not why_no_kernel,
        is_24=not reason,
        why_not_24=reason,
        num_bytes=problem.num_bytes if family == "conv" else _gemm_bytes(problem),
    )


def _gemm_bytes(p: Any) -> int:
    """Return the bytes of X, the dense W, D and the residual, each once."""
    out = p.tokens * p.outputs * DTYPE_BYTES[p.out_dtype] * (2 if p.epilogue.residual else 1)
    return int((p.tokens * p.inputs + p.weight_rows * p.inputs) * DTYPE_BYTES[p.dtype] + out)


class Front:
    """An ONNX file read once and lowered for any batch size."""

    def __init__(self, path: str | Path, *, fallback: bool = False) -> None:
        """Read the file.

        Args:
            fallback: keep operators that the engine lacks as steps that ONNX Runtime runs on the CPU.
        """
        self.path, self.fallback = Path(path), fallback
        self._model = parse_onnx_file(self.path)

    def default_batches(self, otherwise: tuple[int, ...]) -> tuple[int, ...]:
        """Return the batch sizes that are meant where none are given: the one that the file was exported for, else `otherwise`."""
        return default_batches(self._model, otherwise)

    def graph(self, batch: int) -> ir.Model:
        """Return the imported graph for one batch size, before any pass.

        Raises:
            InputError, UnsupportedError: as `exchange.importer.import_graph`.
        """
        model = prepare_model(self._model.clone(), batch, str(self.path), fold=fold, fallback=self.fallback)
        if self.fallback:
            Fallbacks()(model)
        return model

    def lower(self, batch: int, precision: str) -> Lowered:
        """Return the layers for one batch size.

        Raises:
            InputError, UnsupportedError: as `graph`, or an unknown precision.
        """
        return lower(prepare(self.graph(batch), precision), batch, precision)
