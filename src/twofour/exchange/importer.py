"""`import_graph`: an ONNX file as an fp32 graph of static shapes for one batch size, ready for the builder's passes."""

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from twofour.errors import InputError, TwofourError, UnsupportedError
from twofour.exchange.fits import why_ill_formed
from twofour.exchange.gathers import spread_gathers
from twofour.exchange.inspect import parse_onnx_file
from twofour.exchange.support import NO_OPERATOR, why_unsupported
from twofour.plan.record import printable

logger = logging.getLogger(__name__)
SHAPE_OF_INPUT = frozenset({"GroupNormalization", "RMSNormalization", "Swish", "HardSwish", "Mish", "Gelu", "Celu"})
LARGEST_BATCH = 2**31 - 1
OLDEST_OPSET, NEWEST_OPSET = 13, 24
INTEGRAL = frozenset({ir.DataType.INT64, ir.DataType.INT32, ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.BOOL})
FLOATING = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE})
# Folds a graph's constants and returns whether anything changed; the builder gives its own, so that shapes that are computed become known.
Fold = Callable[[ir.Model], bool]


def check_opset(model: ir.Model, where: str) -> None:
    """Do nothing if the model's ONNX opset is one of 13 to 24.

    Raises:
        UnsupportedError: it is not.
    """
    version = model.opset_imports.get("", model.opset_imports.get("ai.onnx", 0))
    if not OLDEST_OPSET <= version <= NEWEST_OPSET:
        raise UnsupportedError(
            f"import: {where!r} uses ONNX opset {version}, expected {OLDEST_OPSET} to {NEWEST_OPSET}; export it with one of these"
        )


def fixed_batches(model: ir.Model) -> tuple[int, ...]:
    """Return the size of each input's first axis, in order; nothing where one of them is symbolic: such a model takes any batch."""
    sizes = [value.shape[0] for value in model.graph.inputs if value.shape and not value.is_initializer()]
    return tuple(size for size in sizes if isinstance(size, int)) if all(isinstance(size, int) for size in sizes) else ()


def refuse_other_batch(fixed: tuple[int, ...], batch: int, where: str) -> None:
    """Do nothing if a model of these `fixed_batches` takes `batch`.

    Raises:
        InputError: it does not.
    """
    if fixed and batch not in fixed:
        raise InputError(
            f"import: {where!r} was exported for batches of {fixed[0]}, batch {batch} was asked for; "
            f"ask for {fixed[0]}, or export it with a dynamic batch"
        )


def with_batch(model: ir.Model, batch: int, where: str) -> None:
    """Give the symbolic first axis of every input the size `batch`.

    Raises:
        InputError: the batch is fixed to another size, an input has no type or shape, or an axis of size 0. UnsupportedError: another axis
            is symbolic, or an input holds what is no number.
    """
    fixed = fixed_batches(model)
    for value in model.graph.inputs:
        if value.shape is None or value.dtype is None:
            raise InputError(f"import: input {value.name!r} of {where!r} has no type or shape; export the model with both")
        if value.dtype not in FLOATING | INTEGRAL:
            known = ", ".join(sorted(kind.name.lower() for kind in FLOATING | INTEGRAL))
            raise UnsupportedError(f"import: input {value.name!r} of {where!r} is {value.dtype.name.lower()}, expected one of {known}")
        sizes: list[int] = []
        for axis, size in enumerate(value.shape):
            if isinstance(size, int):
                sizes.append(size)
            elif axis == 0:
                sizes.append(batch)
            else:
                raise UnsupportedError(
                    f"import: input {value.name!r} of {where!r} has the dynamic axis {axis} ({size}); "
                    "only the batch (axis 0) may be dynamic"
                )
        if 0 in sizes:
            raise InputError(f"import: input {value.name!r} of {where!r} is empty, its shape is {sizes}; export the model with real sizes")
        value.shape = ir.Shape(sizes)
    refuse_other_batch(fixed, batch, where)


def refuse_bare_outputs(model: ir.Model, where: str) -> None:
    """Do nothing if every output is computed by a node, and given once.

    Raises:
        UnsupportedError: one is an input or a constant itself, or listed twice.
    """
    for index, value in enumerate(model.graph.outputs):
        if value.producer() is None:
            raise UnsupportedError(f"import: output {value.name!r} of {where!r} is an input or a constant itself; leave it out")
        if any(value is other for other in model.graph.outputs[:index]):
            raise UnsupportedError(f"import: {where!r} lists the output {value.name!r} twice; leave one out")


def to_fp32(model: ir.Model) -> None:
    """Make every floating initializer, attribute, cast and value fp32; precision is the builder's choice."""
    for value in model.graph.initializers.values():
        if value.const_value is not None and value.const_value.dtype in FLOATING - {ir.DataType.FLOAT}:
            value.const_value = ir.Tensor(value.const_value.numpy().astype(np.float32), name=value.name)
            value.dtype = ir.DataType.FLOAT
    for value in model.graph.inputs:
        if value.dtype in FLOATING:
            value.dtype = ir.DataType.FLOAT
    for node in model.graph:
        for name, attribute in list(node.attributes.items()):
            if not isinstance(attribute, ir.Attr):
                continue
            if attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype in FLOATING:
                node.attributes[name] = ir.AttrTensor(name, ir.Tensor(attribute.value.numpy().astype(np.float32)))
            elif node.op_type == "Cast" and name == "to" and ir.DataType(attribute.value) in FLOATING:
                node.attributes[name] = ir.AttrInt64(name, int(ir.DataType.FLOAT))
        for value in node.outputs:
            if value.dtype in FLOATING:
                value.dtype = ir.DataType.FLOAT


def forget_shapes(model: ir.Model) -> None:
    """Drop the shapes of everything a node computes; they may name another batch."""
    for node in model.graph:
        for value in node.outputs:
            value.shape = None


def infer_shapes(model: ir.Model, fold: Fold | None) -> None:
    """Infer shapes; folding constants in between makes sizes that the graph computes itself known."""
    infer = common.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)
    for _ in range(8):
        infer(model)
        for node in model.graph:
            # ONNX defines these by functions, through which its inference does not look.
            if node.op_type in SHAPE_OF_INPUT and node.inputs[0] is not None and node.outputs[0].shape is None:
                node.outputs[0].shape, node.outputs[0].type = node.inputs[0].shape, node.inputs[0].type
        if fold is None or not fold(model):
            break


def missing(model: ir.Model) -> dict[str, list[str]]:
    """Return the operators, or forms of them, that we lack: name and reason -> the nodes that use it, in graph order."""
    found: dict[str, list[str]] = {}
    for index, node in enumerate(model.graph):
        reason = why_unsupported(node)
        if reason:
            kind = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
            named = kind if reason == NO_OPERATOR else f"{kind} with {reason}"
            found.setdefault(named, []).append(node.name or f"node {index}")
    return found


def refuse_missing(model: ir.Model, where: str, found: dict[str, list[str]] | None = None) -> None:
    """Do nothing if the engine has every operator of the model.

    Raises:
        UnsupportedError: it lacks some; the message lists them all with the nodes that use them.
    """
    found = missing(model) if found is None else found
    if found:
        listed = "; ".join(f"{kind} ({', '.join(nodes)})" for kind, nodes in found.items())
        count = sum(len(nodes) for nodes in found.values())
        raise UnsupportedError(
            f"import: {where!r} has {count} node{'s' if count != 1 else ''} with operators that the engine lacks: {listed}; "
            "build with fallback to run them on the CPU"
        )


def named(node: ir.Node, index: int) -> str:
    """Return how a sentence speaks of a node."""
    return f"{node.op_type} ({node.name or f'node {index}'})"


def refuse_ill_formed(model: ir.Model, where: str) -> None:
    """Do nothing if the operands of every node fit each other.

    Raises:
        InputError: those of one do not.
    """
    for index, node in enumerate(model.graph):
        reason = why_ill_formed(node)
        if reason:
            raise InputError(f"import: {where!r} cannot be computed: {named(node, index)}: {reason}; export the model again")


def refuse_hopeless(model: ir.Model, where: str) -> None:
    """Do nothing if what the engine lacks can be run by ONNX Runtime.

    Raises:
        UnsupportedError: nodes are of a domain of their own or hold graphs (If, Loop), or the size of what they give is not known before
            they run.
    """
    hopeless = []
    for index, node in enumerate(model.graph):
        used = [value for value in node.outputs if value.uses() or value.is_graph_output()]
        # What a graph inside reads from around it would be lost: a fallback is a model of its one node.
        inner = any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values())
        if inner and why_unsupported(node):
            hopeless.append(f"{named(node, index)}, which holds a graph of its own")
        elif node.domain not in ("", "ai.onnx", "twofour"):
            hopeless.append(f"{node.domain}.{named(node, index)}")
        elif any(value.shape is None or not all(isinstance(size, int) for size in value.shape) for value in used):
            hopeless.append(f"{named(node, index)}, whose output's size is not known before it runs")
    if hopeless:
        nodes = f"{len(hopeless)} node{'s' if len(hopeless) != 1 else ''}"
        raise UnsupportedError(f"import: {where!r} has {nodes} that fallback cannot run either: {'; '.join(hopeless)}")


def import_graph(path: str | Path, batch: int, *, fold: Fold | None = None, fallback: bool = False) -> ir.Model:
    """Return the ONNX model at `path` as an fp32 graph whose every shape is static for `batch`.

    Local functions are inlined, constants are initializers, external data are read. Opsets 13 to 24.

    Args:
        fold: folds constants between rounds of shape inference.
        fallback: leave operators that we lack in the graph instead of refusing them.

    Raises:
        InputError: no readable model, or a fixed batch other than `batch`.
        UnsupportedError: another opset, dynamic axes other than the batch, or operators that we lack.
    """
    return prepare_model(parse_onnx_file(Path(path)), batch, str(path), fold=fold, fallback=fallback)


def prepare_model(model: ir.Model, batch: int, where: str, *, fold: Fold | None = None, fallback: bool = False) -> ir.Model:
    """Return `model`, changed in place, as `import_graph` does; `where` names it in errors."""
    try:
        return _prepared(model, batch, where, fold, fallback)
    except TwofourError as error:
        # A refusal names nodes, axes and attributes as the file does.
        raise type(error)(printable(str(error))) from None


def _prepared(model: ir.Model, batch: int, where: str, fold: Fold | None, fallback: bool) -> ir.Model:
    """As `prepare_model`."""
    if not 1 <= batch <= LARGEST_BATCH:
        raise InputError(f"import: batch is {batch}, expected 1 to {LARGEST_BATCH}")
    check_opset(model, where)
    if model.functions:
        common.InlinePass()(model)
    common.RemoveInitializersFromInputsPass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    refuse_bare_outputs(model, where)
    with_batch(model, batch, where)
    to_fp32(model)
    forget_shapes(model)
    for value in model.graph.outputs:
        value.shape = None
    infer_shapes(model, fold)
    if spread_gathers(model):
        infer_shapes(model, fold)
    refuse_ill_formed(model, where)
    if fallback:
        refuse_hopeless(model, where)
    else:
        refuse_missing(model, where)
    return model
