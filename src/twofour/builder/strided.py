"""Views as arithmetic: which elements of which value a chain of reshapes, transposes and slices reads, without moving any."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import onnx_ir as ir

from twofour.builder.graph import shape_of

Factor = tuple[int, int]  # size > 1, stride in elements
Axis = tuple[Factor, ...]  # outermost first; empty for an axis of size 1


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides in elements of a contiguous array."""
    return tuple(prod(shape[i + 1 :]) for i in range(len(shape)))


def size_of(axis: Axis) -> int:
    """Return the size of an axis."""
    return prod(size for size, _ in axis)


def coalesced(axis: Axis) -> Axis:
    """Return the axis with neighbouring factors merged where one continues the other: (a, b s), (b, s) -> (a b, s)."""
    merged: list[Factor] = []
    for size, stride in axis:
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        elif size > 1:
            merged.append((size, stride))
    return tuple(merged)


def split(axis: Axis, sizes: Sequence[int]) -> tuple[Axis, ...] | None:
    """Return the axis cut into axes of the given sizes, whose product is its size; None where a cut would fall between two factors."""
    left = list(axis)
    parts: list[Axis] = []
    for wanted in sizes:
        part: list[Factor] = []
        while wanted > 1:
            if not left:
                return None
            size, stride = left[0]
            if wanted % size == 0:
                part.append(left.pop(0))
                wanted //= size
            elif size % wanted == 0:
                inner = size // wanted
                part.append((wanted, stride * inner))
                left[0] = (inner, stride)
                wanted = 1
            else:
                return None
        parts.append(coalesced(tuple(part)))
    return tuple(parts)


@dataclass(frozen=True)
class Strided:
    """A view of a value: element `[i…]` is `root[offset + sum of index · stride over all factors]`.

    An axis of several factors is what is left of two joined axes that do not follow each other in memory; joining and cutting it again
    costs nothing.
    """

    root: ir.Value
    offset: int
    axes: tuple[Axis, ...]

    @classmethod
    def whole(cls, root: ir.Value) -> "Strided":
        """Return the view that is `root` itself."""
        shape = shape_of(root)
        return cls(root, 0, tuple(() if n == 1 else ((n, s),) for n, s in zip(shape, row_major(shape), strict=True)))

    @property
    def shape(self) -> tuple[int, ...]:
        """Size of every axis."""
        return tuple(size_of(axis) for axis in self.axes)

    def transposed(self, perm: Sequence[int]) -> "Strided":
        """Return the axes in another order."""
        return replace(self, axes=tuple(self.axes[p] for p in perm))

    def reshaped(self, shape: Sequence[int]) -> "Strided | None":
        """Return the same elements with another shape, None where that needs a copy."""
        axes = split(coalesced(tuple(factor for axis in self.axes for factor in axis)), shape)
        return None if axes is None else replace(self, axes=axes)

    def sliced(self, axis: int, start: int, count: int, step: int = 1) -> "Strided | None":
        """Return `count` elements of an axis from `start` on, every `step`-th; None where that needs a copy."""
        factors = coalesced(self.axes[axis])
        if count == size_of(factors) and step == 1:
            return self
        if count == 1:
            offset, inner = self.offset, size_of(factors)
            for size, stride in factors:
                inner //= size
                offset += start // inner % size * stride
            return replace(self, offset=offset, axes=(*self.axes[:axis], (), *self.axes[axis + 1 :]))
        size, stride = factors[0]
        inner = size_of(factors[1:])
        if inner > 1 and (step != 1 or start % inner or count % inner):
            return None
        first = (count // inner, stride * step)
        kept: Axis = (first, *factors[1:]) if first[0] > 1 else factors[1:]
        return replace(self, offset=self.offset + start // inner * stride, axes=(*self.axes[:axis], kept, *self.axes[axis + 1 :]))

    def expanded(self, shape: Sequence[int]) -> "Strided":
        """Return the view broadcast to `shape`; repeated axes have stride 0."""
        padded = ((),) * (len(shape) - len(self.axes)) + self.axes
        return replace(self, axes=tuple(axis or (() if n == 1 else ((n, 0),)) for axis, n in zip(padded, shape, strict=True)))

    def flat(self) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Return (shape, strides) with one stride an axis (0 for size 1), None where an axis has several factors."""
        axes = [coalesced(axis) for axis in self.axes]
        if any(len(axis) > 1 for axis in axes):
            return None
        return tuple(size_of(axis) for axis in axes), tuple(axis[0][1] if axis else 0 for axis in axes)

    @property
    def factors(self) -> list[tuple[int, int, int, int]]:
        """(axis, place within the axis, size, stride) of every factor of the merged axes, in logical order."""
        return [(a, j, size, stride) for a, axis in enumerate(self.axes) for j, (size, stride) in enumerate(coalesced(axis))]


@dataclass(frozen=True)
class Order:
    """A physical order of a view's factors: for every physical axis (logical axis, place), None for one of size 1; and its sizes."""

    places: tuple[tuple[int, int] | None, ...]
    shape: tuple[int, ...]

    @classmethod
    def logical(cls, shape: Sequence[int]) -> "Order":
        """Return the order of a contiguous value of `shape`."""
        return cls(tuple((a, 0) for a in range(len(shape))), tuple(shape))

    def sizes(self, axis: int) -> list[int]:
        """Return the sizes of a logical axis' factors, outermost first."""
        found = sorted((place[1], n) for place, n in zip(self.places, self.shape, strict=True) if place is not None and place[0] == axis)
        return [n for _, n in found]

    def view_of(self, root: ir.Value, rank: int) -> Strided:
        """Return the logical view of `rank` axes on a contiguous value that has this physical shape."""
        strides = row_major(self.shape)
        axes: list[list[tuple[int, Factor]]] = [[] for _ in range(rank)]
        for place, size, stride in zip(self.places, self.shape, strides, strict=True):
            if place is not None and size > 1:
                axes[place[0]].append((place[1], (size, stride)))
        return Strided(root, 0, tuple(coalesced(tuple(f for _, f in sorted(axis))) for axis in axes))


def memory_order(view: Strided) -> Order:
    """Return the order in which the view's elements lie in memory, repeated axes outermost.

    Where the view is the whole of its root, the root's own shape with its axes of size 1 is kept.
    """
    factors = sorted(view.factors, key=lambda f: (f[3] != 0, -f[3]))
    sizes = [size for _, _, size, _ in factors]
    root = shape_of(view.root)
    if is_whole(view) and sizes == [n for n in root if n > 1]:
        left = iter(factors)
        return Order(tuple(None if n == 1 else next(left)[:2] for n in root), root)
    return Order(tuple(f[:2] for f in factors), tuple(sizes))


def is_whole(view: Strided) -> bool:
    """Whether the view shows every element of its root exactly once."""
    factors = sorted(view.factors, key=lambda f: -f[3])
    strides = [stride for _, _, _, stride in factors]
    return view.offset == 0 and prod(view.shape) == prod(shape_of(view.root)) and strides == list(row_major([f[2] for f in factors]))


def arranged(view: Strided, order: Order) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Return (shape, strides) of the view's axes in a physical order; axes of size 1 stay 1. None where a factor would have to be cut."""
    parts: dict[tuple[int, int], Factor] = {}
    for axis, factors in enumerate(view.axes):
        if not factors:
            continue
        wanted = order.sizes(axis)
        pieces = split(factors, wanted) if size_of(factors) == prod(wanted) else (coalesced(factors),) if len(wanted) == 1 else None
        if pieces is None or any(len(piece) > 1 for piece in pieces):
            return None
        for j, piece in enumerate(pieces):
            parts[axis, j] = piece[0] if piece else (1, 0)
    chosen = [(1, 0) if place is None else parts.get(place, (1, 0)) for place in order.places]
    return tuple(n for n, _ in chosen), tuple(s for _, s in chosen)
