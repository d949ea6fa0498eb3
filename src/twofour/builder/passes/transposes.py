"""Transpose sinking: views cost nothing until a step needs its operand in another order, and most steps can follow the order they get."""

from collections.abc import Callable
from math import prod
from typing import Any

import onnx_ir as ir

from twofour.builder.graph import attribute, attributes_of, constant_of, is_op, make_node, nodes_of, replace, shape_of
from twofour.builder.passes.infra import Rewrite, require_static
from twofour.builder.passes.materialise import ALIGNED, Materialiser, repeated, total
from twofour.builder.passes.viewing import VIEWS, view_of
from twofour.builder.strided import Order, Strided, arranged, is_whole, memory_order, row_major
from twofour.errors import UnsupportedError


class SinkTransposes(Rewrite):
    """Removes Transpose, Reshape, Slice and their kin by following, for every value, where its elements lie.

    1. A chain of views is one view of the value at its beginning; joined axes remember what they were joined from.
    2. Pointwise, Concat and Pad work in the memory order of their largest operand; their result is the same view of a new value.
    3. Linear permutes nothing but leading axes, Reduce works where its axes lie side by side: both follow the operand's memory order.
    4. Conv, Pool, Resize, Attention, MatMul and outputs of the graph want a certain order: a Copy only where the operand has another.

    Transposes that meet their inverse are gone; what is left are View nodes, which cost nothing, and the Copy nodes that must be.
    """

    def requires(self, model: ir.Model) -> None:
        """Every shape is static."""
        require_static(model, self.name)

    def rewrite(self, graph: ir.Graph) -> int:
        """Rebuild the graph's steps in order."""
        if not any(is_op(node, *VIEWS, "Concat", "Pad") for node in graph):
            return 0
        return _Sinking(graph).run()

    def ensures(self, model: ir.Model) -> None:
        """Only steps of the fused graph are left.

        Raises:
            UnsupportedError: there are others; the message lists them all.
        """
        left = [f"{node.op_type} ({node.name})" for node in model.graph if node.domain != "twofour" and not is_op(node, "Identity", *VIEWS)]
        if left:
            raise UnsupportedError(f"{self.name}: the engine has no step for {', '.join(left)}; build with fallback to run them on the CPU")


class _Sinking:
    """One run over one graph: `views` says where the elements of each old value lie in the new ones."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.make = Materialiser(graph)
        self.views: dict[ir.Value, Strided] = {}

    def run(self) -> int:
        """Rewrite every node, then the outputs; return how many steps were looked at."""
        steps: dict[str, Callable[[ir.Node], None]] = {"Pointwise": self._pointwise, "Linear": self._linear, "Reduce": self._reduce}
        steps |= {"Conv": self._image, "Pool": self._image, "Resize": self._image, "Attention": self._attention, "Fallback": self._fallback}
        nodes = list(nodes_of(self.graph))
        for node in nodes:
            if node.domain == "twofour" and node.op_type in steps:
                steps[node.op_type](node)
            elif is_op(node, *VIEWS):
                view_of(node, self.see, lambda view, node=node: Strided.whole(self.make.copy(node, view)), self.views)  # type: ignore[misc]
            elif is_op(node, "Concat"):
                self._concat(node)
            elif is_op(node, "Pad"):
                self._pad(node)
            elif is_op(node, "MatMul"):
                self._matmul(node)
        self._outputs()
        return len(nodes)

    def see(self, value: ir.Value | None) -> Strided:
        """Return where a value's elements lie."""
        assert value is not None
        if value not in self.views:
            self.views[value] = Strided.whole(value)
        return self.views[value]

    def _emit(
        self,
        node: ir.Node,
        kind: str,
        inputs: list[ir.Value | None],
        order: Order,
        attributes: dict[str, Any] | None = None,
        rank: int | None = None,
    ) -> None:
        """Make the step whose result has this physical order, and record the old output as a view of it."""
        output = node.outputs[0]
        dtype = output.dtype or ir.DataType.FLOAT
        new = make_node(
            self.graph, node, kind, inputs, order.shape, attributes or attributes_of(node), like=node, stem=f"{output.name}", dtype=dtype
        )
        self.views[output] = order.view_of(new, len(shape_of(output)) if rank is None else rank)

    def _arrange(self, node: ir.Node, view: Strided, order: Order) -> ir.Value:
        """Return an operand in a physical order, axes of size 1 kept for broadcasting."""
        found = arranged(view, order)
        if found is None:
            found = arranged(view := Strided.whole(self.make.copy(node, view)), order)
            assert found is not None
        return self.make.view(node, view, *found)

    def _leader(self, views: list[Strided], shape: tuple[int, ...]) -> Strided | None:
        """Return the operand whose memory order the step follows: of the full shape, a whole computed value, unpermuted, in this order."""

        def rank(view: Strided) -> tuple[bool, bool, bool]:
            unpermuted = memory_order(view).places == Order.logical(shape).places
            return is_whole(view), constant_of(view.root) is None, unpermuted

        full = [view for view in views if view.shape == shape and not repeated(view)]
        return max(full, key=rank) if full else None

    def _pointwise(self, node: ir.Node) -> None:
        shape = shape_of(node.outputs[0])
        rank = len(shape)
        views = [self.see(value) for value in node.inputs]
        views = [Strided(v.root, v.offset, ((),) * (rank - len(v.axes)) + v.axes) for v in views]
        leader = self._leader(views, shape)
        order = memory_order(leader) if leader is not None else Order.logical(shape)
        self._emit(node, "Pointwise", [self._arrange(node, view, order) for view in views], order)

    def _concat(self, node: ir.Node) -> None:
        shape = shape_of(node.outputs[0])
        axis = int(attribute(node, "axis")) % len(shape)
        views = [self.see(value) for value in node.inputs]
        leader = max(views, key=lambda view: (total(view), is_whole(view)))
        order = memory_order(leader)
        places = [place for place in order.places if place is not None and place[0] == axis]
        if len(places) != 1 or repeated(leader):
            order, places = Order.logical(shape), [(axis, 0)]
        at = order.places.index(places[0])
        order = Order(order.places, tuple(shape[axis] if i == at else n for i, n in enumerate(order.shape)))
        inputs = []
        for view in views:
            own = Order(order.places, tuple(view.shape[axis] if i == at else n for i, n in enumerate(order.shape)))
            inputs.append(self._arrange(node, view, own))
        self._emit(node, "Concat", list(inputs), order, {"axis": at})

    def _pad(self, node: ir.Node) -> None:
        x, amounts = self.see(node.inputs[0]), constant_of(node.inputs[1])
        rank = len(x.shape)
        axes = constant_of(node.inputs[3]) if len(node.inputs) > 3 and node.inputs[3] is not None else range(rank)
        value = constant_of(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else None
        assert amounts is not None
        assert axes is not None
        around = {int(a) % rank: (int(amounts[i]), int(amounts[len(axes) + i])) for i, a in enumerate(axes)}
        padded = {a for a, (begin, end) in around.items() if begin or end}
        order = memory_order(x)
        if repeated(x) or any(sum(place is not None and place[0] == a for place in order.places) != 1 for a in padded):
            order = Order.logical(x.shape)
        pairs = [around.get(place[0], (0, 0)) if place is not None and place[0] in padded else (0, 0) for place in order.places]
        source = self._arrange(node, x, order)
        grown = Order(order.places, tuple(n + b + e for n, (b, e) in zip(order.shape, pairs, strict=True)))
        attributes = {"pads": [b for b, _ in pairs] + [e for _, e in pairs], "value": 0.0 if value is None else float(value.reshape(-1)[0])}
        self._emit(node, "Pad", [source], grown, attributes)

    def _linear(self, node: ir.Node) -> None:
        x = self.see(node.inputs[0])
        features = x.shape[-1]
        rank = len(x.axes)
        order = memory_order(x)
        last = order.places[-1] if order.places else None
        follows = not repeated(x) and is_whole(x) and last is not None and last[0] == rank - 1 and len(order.sizes(rank - 1)) == 1
        if features == 1:
            order = Order.logical(x.shape)
            operand = self.make.contiguous(node, x)
        elif follows:
            operand = self._arrange(node, x, order)
        else:
            lead = [(place, n) for place, n in zip(order.places, order.shape, strict=True) if place is None or place[0] != rank - 1]
            if repeated(x):
                lead = [((a, 0), n) for a, n in enumerate(x.shape[:-1])]
            kept = [(place, n) for place, n in lead if n > 1]
            order = Order((*(place for place, _ in kept), (rank - 1, 0)), (*(n for _, n in kept), features))
            operand = self._gathered(node, x, order)
        outputs = shape_of(node.outputs[0])[-1]
        places = (*order.places[:-1], (rank - 1, 0))
        self._emit(node, "Linear", [operand, *node.inputs[1:]], Order(places, (*order.shape[:-1], outputs)), rank=rank)

    def _gathered(self, node: ir.Node, view: Strided, order: Order) -> ir.Value:
        """Return a contiguous operand in a physical order, copied where it does not lie so."""
        found = arranged(view, order)
        if found is None:
            return self._arrange(node, Strided.whole(self.make.copy(node, view)), order)
        shape, strides = found
        axes = tuple(() if n == 1 else ((n, s),) for n, s in zip(shape, strides, strict=True))
        return self.make.contiguous(node, Strided(view.root, view.offset, axes))

    def _reduce(self, node: ir.Node) -> None:
        x, axes = self.see(node.inputs[0]), [int(a) for a in attribute(node, "axes")]
        kind, rank = attribute(node, "kind"), len(x.axes)
        along = kind in ("layernorm", "rmsnorm", "softmax")
        order = memory_order(x)
        inside = [i for i, place in enumerate(order.places) if place is not None and place[0] in axes]
        span = range(inside[0], inside[-1] + 1) if inside else range(0)
        fits = bool(inside) and is_whole(x) and all(i in inside or order.places[i] is None for i in span)
        in_order = [order.places[i] for i in inside] == sorted(order.places[i] for i in inside)  # type: ignore[type-var]
        if along:
            fits = fits and in_order and inside[-1] == len(order.places) - 1 and len(inside) == len(span)
            fits = fits and (
                len(node.inputs) == 1
                or [n for i, n in enumerate(order.shape) if i in inside] == [x.shape[a] for a in axes if x.shape[a] > 1]
            )
        if not fits:
            kept = [(p, n) for p, n in zip(order.places, order.shape, strict=True) if p is not None and p[0] not in axes and n > 1]
            if repeated(x):
                kept = [((a, 0), n) for a, n in enumerate(x.shape) if a not in axes and n > 1]
            order = Order((*(p for p, _ in kept), *((a, 0) for a in axes)), (*(n for _, n in kept), *(x.shape[a] for a in axes)))
            operand = self._gathered(node, x, order)
            inside = list(range(len(kept), len(kept) + len(axes)))
            span = range(len(kept), len(kept) + len(axes))
        else:
            operand = self._arrange(node, x, order)
        attributes = {"kind": kind, "axes": list(span), "eps": float(attribute(node, "eps", 0.0))}
        if along:
            vectors = [self._vector(value, [order.shape[i] for i in span], node) for value in node.inputs[1:]]
            self._emit(node, "Reduce", [operand, *vectors], order, attributes)
            return
        places = tuple(None if i in span else place for i, place in enumerate(order.places))
        shape = tuple(1 if i in span else n for i, n in enumerate(order.shape))
        self._emit(node, "Reduce", [operand], Order(places, shape), attributes, rank)

    def _vector(self, value: ir.Value | None, shape: list[int], node: ir.Node) -> ir.Value | None:
        """Return a norm's scale or bias in the shape of the axes it runs along."""
        if value is None:
            return None
        return self.make.view(node, Strided.whole(value), shape, row_major(shape))

    def _image(self, node: ir.Node) -> None:
        x = self.make.pitched(node, self.see(node.inputs[0]), ALIGNED if node.op_type == "Conv" else 1)
        self._emit(node, node.op_type, [x, *node.inputs[1:]], Order.logical(shape_of(node.outputs[0])))

    def _attention(self, node: ir.Node) -> None:
        operands = []
        for value in node.inputs:
            view = self.see(value)
            flat = view.flat()
            usable = flat is not None and (flat[0][-1] == 1 or flat[1][-1] == 1) and not repeated(view) and view.offset % 8 == 0
            usable = usable and flat is not None and all(n == 1 or s % 8 == 0 for n, s in zip(flat[0][:-1], flat[1][:-1], strict=True))
            operands.append(self.make.view(node, view, *flat) if usable and flat is not None else self.make.contiguous(node, view))
        self._emit(node, "Attention", list(operands), Order.logical(shape_of(node.outputs[0])))

    def _matmul(self, node: ir.Node) -> None:
        shape = shape_of(node.outputs[0])
        lead, batch = shape[:-2], prod(shape[:-2])
        operands = []
        for value in node.inputs:
            view = self.see(value)
            own = view.shape[-2:]
            whole = view.reshaped((prod(view.shape[:-2]), *own)) if prod(view.shape[:-2]) in (1, batch) else None
            flat = None if whole is None else whole.flat()
            usable = flat is not None and any(n == 1 or s == 1 for n, s in zip(flat[0][1:], flat[1][1:], strict=True))
            if whole is not None and flat is not None and usable and not repeated(view):
                operands.append(self.make.view(node, whole, *flat))
            else:
                full = view.expanded((*lead, *own)) if prod(view.shape[:-2]) not in (1, batch) else view
                copied = Strided.whole(self.make.copy(node, full))
                size = (prod(full.shape[:-2]), *own)
                operands.append(self.make.view(node, copied, size, row_major(size)))
        output = node.outputs[0]
        new = make_node(self.graph, node, "MatMul", operands, (batch, *shape[-2:]), like=node, stem=f"{output.name}")
        whole = Strided.whole(new).reshaped(shape)
        assert whole is not None
        self.views[output] = whole

    def _fallback(self, node: ir.Node) -> None:
        for index, value in enumerate(node.inputs):
            if value is not None:
                node.replace_input_with(index, self.make.contiguous(node, self.see(value)))

    def _outputs(self) -> None:
        """Give every output of the graph its logical order, in a value of its own."""
        for value in list(self.graph.outputs):
            node = value.producer()
            if node is None or value not in self.views or self.views[value].root is value:
                continue
            new = self.make.contiguous(node, self.views[value])
            maker = new.producer()
            if (
                maker is None
                or new.is_graph_output()
                or (maker.op_type == "View" and maker.inputs[0] is not None and maker.inputs[0].producer() is None)
            ):
                new = make_node(self.graph, node, "Copy", [new], shape_of(new), like=node, dtype=value.dtype or ir.DataType.FLOAT)
            replace(self.graph, value, new)
