"""`inspect`: is a file 2:4, which layers are, which could be, which cannot and why."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from twofour.errors import InputError, PlanFormatError
from twofour.exchange.onnx_weights import weights_of
from twofour.files import existing_file
from twofour.pattern import GroupCount, count_groups
from twofour.plan import Plan
from twofour.plan.record import one_line
from twofour.pruning.record import PRUNING_KEY, Pruning


@dataclass(frozen=True)
class WeightVerdict:
    """One weight of a file.

    Attributes:
        axis: the reduction axis, along which the groups of four run.
        eligible: whether the sparse units can take it.
        reason: why not, or why the pruning record left it dense.
        required: whether the file's verdict counts it (eligible, and not recorded as left dense).
        groups: obeying and all groups; None where the axis is no multiple of 4.
    """

    name: str
    operation: str
    shape: tuple[int, ...]
    axis: int
    eligible: bool
    reason: str
    required: bool
    groups: GroupCount | None

    @property
    def is_24(self) -> bool:
        """Whether every group along the reduction axis has at most two non-zeros."""
        return self.groups is not None and self.groups.is_24


@dataclass(frozen=True)
class Inspection:
    """The verdict on a file: 2:4 when at least one weight is required and all required ones are 2:4."""

    path: str
    kind: str
    weights: tuple[WeightVerdict, ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def violations(self) -> tuple[WeightVerdict, ...]:
        """Required weights that are not 2:4."""
        return tuple(w for w in self.weights if w.required and not w.is_24)

    @property
    def is_24(self) -> bool:
        """Whether the file holds what the sparse units need."""
        return any(w.required for w in self.weights) and not self.violations

    def __str__(self) -> str:
        required = [w for w in self.weights if w.required]
        verdict = "2:4" if self.is_24 else "not 2:4" if required else "no eligible weight"
        return f"Inspection({self.path}: {verdict}; {sum(w.is_24 for w in required)} of {len(required)} eligible weights are 2:4)"

    def to_json(self) -> dict[str, Any]:
        """Return the inspection as plain JSON values."""
        rows = []
        for w in self.weights:
            share = None if w.groups is None else w.groups.share
            rows.append(
                {**{k: v for k, v in w.__dict__.items() if k != "groups"}, "shape": list(w.shape), "share_24": share, "is_24": w.is_24}
            )
        return {"path": self.path, "kind": self.kind, "is_24": self.is_24, "weights": rows, "notes": list(self.notes)}


def verdict(name: str, operation: str, values: Any, axis: int, why_not: str, left_dense: dict[str, str]) -> WeightVerdict:
    """Return the verdict on one weight; `left_dense` maps names to the reason in the file's pruning record."""
    groups = count_groups(values, axis) if values.ndim > axis and values.shape[axis] % 4 == 0 and values.size else None
    reason = why_not or left_dense.get(name, "")
    required = not why_not and name not in left_dense
    return WeightVerdict(name, operation, tuple(values.shape), axis, not why_not, reason, required, groups)


def left_dense_of(record: Pruning | None) -> dict[str, str]:
    """Return the layers that the pruning record left dense, under every name of theirs, with the reason."""
    layers = record.layers if record is not None else ()
    return {name: layer.reason for layer in layers if not layer.eligible for name in (layer.name, *layer.aliases)}


def inspect_model(model: ir.Model, path: str, kind: str) -> Inspection:
    """Return the inspection of an ONNX model."""
    text = model.metadata_props.get(PRUNING_KEY)
    record = Pruning.from_json(text) if text else None
    left_dense = left_dense_of(record)
    seen: set[tuple[str, int]] = set()
    weights = []
    for use in weights_of(model):
        if (use.name, use.axis) not in seen:
            seen.add((use.name, use.axis))
            weights.append(verdict(use.name, use.operation, use.values, use.axis, use.why_not, left_dense))
    notes = () if record is not None else ("no pruning record: every eligible weight counts",)
    return Inspection(path, kind, tuple(weights), notes)


def in_order(model: ir.Model) -> ir.Model:
    """Return `model`, its nodes sorted so that each comes behind what it reads.

    Raises:
        ValueError: a node reads what nothing gives, or its own output.
    """
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        for value in node.inputs:
            if value is not None and value.producer() is None and not value.is_graph_input() and not value.is_initializer():
                raise ValueError(f"{node.op_type} {node.name!r} reads {value.name!r}, which nothing gives")
    model.graph.sort()
    return model


def parse_onnx(data: bytes, where: str) -> ir.Model:
    """Return the ONNX model in `data`.

    Raises:
        InputError: the bytes are no ONNX model.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        proto = onnx.load_model_from_string(data)
        if not proto.graph.node:
            raise InputError(f"{where!r} holds no ONNX graph; expected a model file")
        model = in_order(ir.from_proto(proto))
        if any(True for _ in external_tensors(model)):
            raise InputError(f"{where!r} refers to other files, expected all tensors inside; build the plan again")
        return model
    except (DecodeError, ir.serde.SerdeError, ValueError, TypeError, KeyError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{where!r} is not a readable ONNX file: {one_line(str(error))}") from error


def inspect_safetensors(path: Path) -> Inspection:
    """Return the inspection of a checkpoint; without a graph, every floating tensor of two or more axes named like a weight counts."""
    from safetensors import SafetensorError, safe_open

    weights = []
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            record = Pruning.from_json(metadata[PRUNING_KEY]) if PRUNING_KEY in metadata else None
            left_dense = left_dense_of(record)
            known = {layer.name for layer in record.layers} if record is not None else None
            for name in sorted(file.keys()):
                shape = file.get_slice(name).get_shape()
                counts = name in known if known is not None else name.rpartition(".")[2].endswith("weight")
                if len(shape) < 2 or not counts:
                    continue
                tensor = file.get_tensor(name)
                if not tensor.is_floating_point():
                    continue
                nonzero = (tensor != 0).numpy() if tensor.element_size() > 1 else (tensor.float() != 0).numpy()
                why_not = "" if shape[1] % 4 == 0 else f"{shape[1]} input channels are not a multiple of 4"
                weights.append(verdict(name, "weight", nonzero, 1, why_not, left_dense))
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{str(path)!r} is not a readable safetensors file: {error}") from error
    notes = () if record is not None else ("no pruning record and no graph: every weight of two or more axes counts, embeddings too",)
    return Inspection(str(path), "safetensors", tuple(weights), notes)


def inspect(path: str | Path) -> Inspection:
    """Return, for an ONNX file, a safetensors checkpoint or a plan, which weights are 2:4 along their reduction axis.

    Raises:
        InputError: missing, unreadable, or none of the three kinds.
    """
    path = existing_file(path, "inspect: file")
    if path.suffix == ".onnx":
        return inspect_model(parse_onnx_file(path), str(path), "onnx")
    if path.suffix == ".safetensors":
        return inspect_safetensors(path)
    try:
        plan = Plan.load(path)
    except PlanFormatError as error:
        raise InputError(f"inspect: {str(path)!r} is no .onnx, no .safetensors and no plan ({error})") from error
    if plan.backend != "onnxruntime":
        raise InputError(
            f"plan {str(path)!r} is for the backend {plan.backend!r}, whose weights are packed; inspect the model it was made from"
        )
    return inspect_model(parse_onnx(np.ascontiguousarray(plan.payload["onnx"]).tobytes(), str(path)), str(path), "plan")


def external_tensors(model: ir.Model) -> Iterator[tuple[ir.ExternalTensor, Callable[[ir.Tensor], None]]]:
    """Give every tensor kept outside the model's file, in any subgraph, with the function that replaces it."""

    def of_initializer(value: ir.Value) -> Callable[[ir.Tensor], None]:
        return lambda tensor: setattr(value, "const_value", tensor)

    def of_attribute(node: ir.Node, name: str) -> Callable[[ir.Tensor], None]:
        return lambda tensor: node.attributes.__setitem__(name, ir.AttrTensor(name, tensor))

    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                yield value.const_value, of_initializer(value)
        for node in graph:
            for name, attribute in list(node.attributes.items()):
                if isinstance(attribute, ir.Attr) and isinstance(attribute.value, ir.ExternalTensor):
                    yield attribute.value, of_attribute(node, name)


def read_external(tensor: ir.ExternalTensor, path: Path) -> Any:
    """Return the values of an external tensor of the model at `path`.

    Raises:
        InputError: its file lies outside the model's folder (through `..`, an absolute name or a link), is missing, or is too short.
    """
    folder = path.absolute().parent.resolve()
    location = Path(os.fspath(tensor.location))
    target = (folder / location).resolve()
    if location.is_absolute() or folder not in target.parents:
        raise InputError(f"{str(path)!r}: tensor {tensor.name!r} lies in {str(location)!r}, expected a file in the model's own folder")
    existing_file(target, f"external data of {str(path)!r}:")
    return np.array(tensor.numpy())


def parse_onnx_file(path: Path) -> ir.Model:
    """Return the ONNX model at `path`, external data resolved beside it.

    Raises:
        InputError: missing, damaged, no ONNX, or external data are missing.
    """
    from google.protobuf.message import DecodeError

    path = existing_file(path, "ONNX file")
    try:
        model = ir.load(path)
        if not len(model.graph):
            raise InputError(f"{str(path)!r} holds no ONNX graph; expected a model file")
        for tensor, put in list(external_tensors(model)):
            put(ir.Tensor(read_external(tensor, path), name=tensor.name))
        return in_order(model)
    except (DecodeError, ir.serde.SerdeError, ValueError, TypeError, KeyError, OSError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{str(path)!r} is not a readable ONNX file: {one_line(str(error))}") from error
