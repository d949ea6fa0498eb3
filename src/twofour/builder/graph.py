"""What every pass does with an onnx_ir graph: read shapes, attributes and constants, make nodes, replace values."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from twofour.errors import InputError

Array = npt.NDArray[Any]
DOMAIN = "twofour"
ONNX_DOMAINS = ("", "ai.onnx")


def shape_of(value: ir.Value) -> tuple[int, ...]:
    """Return a value's static shape.

    Raises:
        InputError: it is not known; import makes all shapes static.
    """
    if value.shape is None or not all(isinstance(size, int) for size in value.shape):
        raise InputError(f"value {value.name!r} has the shape {value.shape}, expected numbers; import the graph for one batch first")
    return tuple(int(size) for size in value.shape)  # type: ignore[arg-type]


def elements(value: ir.Value) -> int:
    """Return the number of a value's elements."""
    return int(np.prod(shape_of(value), dtype=np.int64))


def constant_of(value: ir.Value | None) -> Array | None:
    """Return the array of an initializer, None for anything computed or given at run time."""
    if value is None or value.const_value is None or not value.is_initializer():
        return None
    return np.asarray(value.const_value.numpy())


def scalar_of(value: ir.Value | None) -> float | None:
    """Return the number of an initializer of one element, else None."""
    array = constant_of(value)
    return float(array.reshape(-1)[0]) if array is not None and array.size == 1 else None


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    """Return an attribute as a plain Python value or array."""
    found = node.attributes.get(name)
    if found is None or not isinstance(found, ir.Attr):
        return default
    value = found.value
    if found.type == ir.AttributeType.TENSOR:
        return value.numpy()
    if found.type in (ir.AttributeType.INTS, ir.AttributeType.FLOATS, ir.AttributeType.STRINGS):
        return list(value)
    return value


def attributes_of(node: ir.Node) -> dict[str, Any]:
    """Return all attributes as plain Python values and arrays."""
    return {name: attribute(node, name) for name in node.attributes}


def is_op(node: ir.Node | None, *kinds: str) -> bool:
    """Whether a node is one of the given ONNX operators."""
    return node is not None and node.domain in ONNX_DOMAINS and node.op_type in kinds


def is_fused(node: ir.Node | None, *kinds: str) -> bool:
    """Whether a node is one of the given operators of the fused graph."""
    return node is not None and node.domain == DOMAIN and node.op_type in kinds


def producer(value: ir.Value | None) -> Any:
    """Return the node that computes a value, None for inputs, initializers and what is left out (`Any`: `is_op` tells which it is)."""
    return None if value is None else value.producer()


def only_use(value: ir.Value) -> Any:
    """Return the node that alone reads a value, None where there are several or it is an output of the graph."""
    users = {id(use.node): use.node for use in value.uses()}
    return next(iter(users.values())) if len(users) == 1 and len(list(value.uses())) == 1 and not value.is_graph_output() else None


def fresh_name(graph: ir.Graph, stem: str) -> str:
    """Return a value name that the graph does not use, `stem` or `stem.1` and so on."""
    taken = graph.meta.setdefault("twofour.names", None)
    if taken is None:
        taken = {value.name for node in graph for value in node.outputs} | {value.name for value in graph.inputs}
        taken |= set(graph.initializers)
        graph.meta["twofour.names"] = taken
    name, count = stem, 0
    while name in taken or name in graph.initializers:
        count += 1
        name = f"{stem}.{count}"
    taken.add(name)
    return name


def add_constant(graph: ir.Graph, array: Array, stem: str) -> ir.Value:
    """Return a new initializer holding `array`; floating values become fp32."""
    data = np.ascontiguousarray(array, np.float32) if np.issubdtype(array.dtype, np.floating) else np.ascontiguousarray(array)
    # ascontiguousarray makes a scalar one-dimensional.
    data = data.reshape(array.shape)
    name = fresh_name(graph, stem)
    tensor = ir.Tensor(data, name=name)
    value = ir.Value(name=name, shape=ir.Shape(data.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def make_node(
    graph: ir.Graph,
    before: ir.Node,
    kind: str,
    inputs: Sequence[ir.Value | None],
    shape: Sequence[int],
    attributes: dict[str, Any] | None = None,
    *,
    domain: str = DOMAIN,
    stem: str = "",
    like: ir.Node | None = None,
    dtype: ir.DataType = ir.DataType.FLOAT,
) -> ir.Value:
    """Insert a node with one output in front of `before` and return the output.

    Args:
        stem: the output's name, made unique; by default `like`'s first output and the kind.
        like: the node whose work this one takes over; it keeps that node's name, by which reports speak of layers.
    """
    source = like or before
    stem = stem or f"{source.outputs[0].name}.{kind.lower()}"
    output = ir.Value(name=fresh_name(graph, stem), shape=ir.Shape(tuple(int(s) for s in shape)), type=ir.TensorType(dtype))
    node = ir.node(kind, list(inputs), attributes or {}, domain=domain, outputs=[output], name=source.name or f"{source.op_type}")
    graph.insert_before(before, node)
    return output


def replace(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    """Let every reader of `old` read `new`; an output of the graph keeps its name."""
    if old.is_graph_output():
        name = old.name
        for index, value in enumerate(graph.outputs):
            if value is old:
                if new.is_graph_output() or new.producer() is None:
                    # An output is computed by one node and has one name; a second one is an identity.
                    assert old.producer() is not None
                    new = make_identity(graph, old, new)
                graph.outputs[index] = new
        old.replace_all_uses_with(new)
        old.name = fresh_name(graph, f"{name}.replaced")
        new.name = name
        return
    old.replace_all_uses_with(new)


def make_identity(graph: ir.Graph, old: ir.Value, new: ir.Value) -> ir.Value:
    """Insert an Identity of `new` where `old` is computed and return its output."""
    node = old.producer()
    assert node is not None
    return make_node(graph, node, "Identity", [new], shape_of(new), domain="", like=node, dtype=new.dtype or ir.DataType.FLOAT)


def remove(graph: ir.Graph, *nodes: ir.Node) -> None:
    """Remove nodes that nobody reads any more."""
    graph.remove(list(nodes), safe=True)


def nodes_of(graph: ir.Graph) -> Iterator[ir.Node]:
    """Return the nodes in order; the graph may change meanwhile."""
    return iter(list(graph))


def remove_unused(graph: ir.Graph) -> int:
    """Remove nodes and initializers that no output needs; return how many."""
    count = 0
    for node in reversed(list(graph)):
        if not any(value.uses() or value.is_graph_output() for value in node.outputs):
            graph.remove(node, safe=True)
            count += 1
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]
            count += 1
    return count


def set_attribute(node: ir.Node, name: str, value: Any) -> None:
    """Set an attribute from a plain Python value."""
    node.attributes[name] = ir.convenience.convert_attribute(name, value)
