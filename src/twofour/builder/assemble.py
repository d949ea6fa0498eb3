"""From layers and the ways chosen for them to a plan: weights in the form each way reads, memory, compiled kernels, one program a batch."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import prod

import numpy as np

from twofour.builder.graph import Array
from twofour.builder.lower import LayerCall, Lowered
from twofour.builder.memory import MemoryPlan, aligned
from twofour.builder.storage import Place
from twofour.builder.tactics.chosen import Chosen
from twofour.builder.tactics.ways import Way, bias_for, weight_for
from twofour.errors import UnsupportedError
from twofour.jit.cache import default_cache
from twofour.kernels.families import OURS
from twofour.kernels.launchable import Launchable, kernel_source
from twofour.kernels.operands import DTYPE_BYTES
from twofour.pattern import select
from twofour.plan.program import FALLBACK, Program, Step, Value, contiguous
from twofour.plan.record import ValueSpec, cubin_name

PLAN_DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32", "int64": "int64", "int32": "int32", "int8": "int8"}
PLAN_DTYPES |= {"uint8": "uint8", "bool": "bool"}


@dataclass
class Payload:
    """The tensors of a plan; equal ones are held once."""

    tensors: dict[str, Array] = field(default_factory=dict)

    def add(self, kind: str, array: Array) -> str:
        """Return the name under which `array` is held."""
        flat = np.ascontiguousarray(array)
        name = f"{kind}.{hashlib.sha256(str((flat.dtype, flat.shape)).encode() + flat.tobytes()).hexdigest()[:32]}"
        self.tensors.setdefault(name, flat)
        return name

    def add_cubin(self, cubin: bytes) -> str:
        """Return the name under which a compiled kernel is held."""
        name = cubin_name(cubin)
        self.tensors.setdefault(name, np.frombuffer(cubin, np.uint8))
        return name


def forced(call: LayerCall) -> LayerCall:
    """Return the call with its weight pruned to 2:4 by magnitude along the input channels, where a 2:4 kernel could compute it.

    For `sparsity="force"`: what such a network would gain in time; its accuracy is gone.
    """
    if not call.eligible or call.is_24 or call.weight is None:
        return call
    weight = np.where(select(call.weight.reshape(-1, call.weight.shape[-1])), call.weight.reshape(-1, call.weight.shape[-1]), 0)
    return replace(call, weight=weight.reshape(call.weight.shape).astype(np.float32), is_24=True, why_not_24="")


class Assembler:
    """Makes the programs of one plan; they share its payload."""

    def __init__(self, inputs: Sequence[ValueSpec], outputs: Sequence[ValueSpec], num_sms: int) -> None:
        self.inputs, self.outputs, self.num_sms = inputs, outputs, num_sms
        self.payload = Payload()

    def program(
        self,
        lowered: Lowered,
        memory: MemoryPlan,
        chosen: Sequence[Chosen],
        prepared: Sequence[Launchable],
        weights: Sequence[Array | None],
    ) -> Program:
        """Return the program of one batch size.

        Args:
            memory: where activations lie. chosen, prepared: of every call that is no fallback, in order.
            weights: what a library made of a weight on the GPU, else None.

        Raises:
            UnsupportedError: an input or output is used in a form that the plan cannot hold.
        """
        values: dict[str, Value] = {}
        for call in lowered.calls:
            for name in call.operands.values():
                if name not in values:
                    values[name] = self._value(lowered, name, memory)
        steps, workspace = [], 0
        made = iter(zip(chosen, prepared, weights, strict=True))
        for call in lowered.calls:
            if call.family == FALLBACK:
                model = self.payload.add("model", np.frombuffer(lowered.model(call), np.uint8))
                steps.append(Step(call.name, FALLBACK, "onnxruntime", call.problem, None, None, dict(call.operands), {"model": model}))
                continue
            choice, launch, weight = next(made)
            steps.append(self._step(call, choice, launch, weight, values))
            if choice.way.after is not None:
                steps.append(self._after(call, choice.way.after))
            workspace = max(workspace, launch.workspace_bytes)
        used = max((v.offset + v.num_bytes for v in values.values() if v.where == "arena"), default=0)
        return Program(lowered.batch, aligned(used), workspace, values, tuple(steps))

    def _value(self, lowered: Lowered, name: str, memory: MemoryPlan) -> Value:
        place = lowered.places[name]
        for where, roots, specs in (("input", lowered.inputs, self.inputs), ("output", lowered.outputs, self.outputs)):
            if place.root in roots:
                return self._outside(place, where, roots.index(place.root), specs, lowered.batch)
        if place.root in lowered.constants:
            tensor = self.payload.add("constant", _bits(lowered.constants[place.root]))
            offset = place.offset * DTYPE_BYTES[place.dtype]
            return Value(place.dtype, place.shape, place.strides, "weights", offset, tensor)
        offset = memory.offsets[place.root] + place.offset * DTYPE_BYTES[place.dtype]
        return Value(place.dtype, place.shape, place.strides, "arena", offset)

    def _outside(self, place: Place, where: str, index: int, specs: Sequence[ValueSpec], batch: int) -> Value:
        """An input or output as the plan declares it; a step may see it in another shape of as many elements, but not a part of it."""
        shape = tuple(batch if size is None else size for size in specs[index].shape)
        if place.offset or place.elements > prod(shape) or PLAN_DTYPES[place.dtype] != specs[index].dtype:
            raise UnsupportedError(f"build: {where} {specs[index]} is used as {place}, which a plan cannot hold; copy it in the model")
        return Value(place.dtype, shape, contiguous(shape), where, index=index)

    def _step(self, call: LayerCall, choice: Chosen, launch: Launchable, weight: Array | None, values: dict[str, Value]) -> Step:
        way = choice.way
        operands = dict(call.operands)
        if call.weight is not None:
            array = weight_for(call, way) if weight is None else weight
            operands["weight"] = self._held("weight", array, "uint8" if array.dtype == np.uint8 else way.problem.dtype, values)
            bias = bias_for(call, way)
            if bias is not None:
                dtype = "fp32" if bias.dtype == np.float32 else way.problem.dtype
                operands["bias"] = self._held("bias", bias, dtype, values)
        elif call.family == "reduce":
            # Scale and shift of a norm are constants of the graph; the kernel reads them as fp32.
            for name in ("scale", "bias"):
                if name in operands and values[operands[name]].dtype != "fp32":
                    raise UnsupportedError(f"build: {name} of {call.name} is {values[operands[name]].dtype}, expected fp32")
        parts = {}
        if way.library == OURS:
            parts["cubin"] = self._cubin(way)
        elif way.library == "cudnn":
            serialized = launch.call.serialized()  # type: ignore[attr-defined]
            parts["graph"] = self.payload.add("graph", np.frombuffer(serialized, np.uint8))
        return Step(call.name, way.family, way.library, way.problem, way.config, way.algorithm, operands, parts)

    def _after(self, call: LayerCall, way: Way) -> Step:
        """The step that works on a call's output in place."""
        operands = {"in0": call.operands["d"], "d": call.operands["d"]}
        return Step(call.name, way.family, way.library, way.problem, way.config, None, operands, {"cubin": self._cubin(way)})

    def _cubin(self, way: Way) -> str:
        text = kernel_source(way.family, way.problem, way.config, self.num_sms)
        return self.payload.add_cubin(default_cache().get(text).cubin)

    def _held(self, kind: str, array: Array, dtype: str, values: dict[str, Value]) -> str:
        """The name of a value in the payload."""
        tensor = self.payload.add(kind, array)
        values[tensor] = Value(dtype, array.shape, contiguous(array.shape), "weights", 0, tensor)
        return tensor


def _bits(array: Array) -> Array:
    """An array as the payload holds it: bf16 as uint16, bool as uint8."""
    if array.dtype.name == "bfloat16":
        return array.view(np.uint16)
    return array.view(np.uint8) if array.dtype == np.bool_ else array
