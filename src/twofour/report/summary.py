"""What a report says when dense and 2:4 are put beside each other: pairs of its rows, sums and shares, nothing measured anew."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import PurePath
from typing import Generic, Protocol, TypeVar

from twofour.report.record import AccuracyRow, MemoryRow, ProfileRow, Report, SizeRow, SpeedRow


class _HasVariant(Protocol):
    @property
    def variant(self) -> str: ...


R = TypeVar("R", bound=_HasVariant)


@dataclass(frozen=True)
class Pair(Generic[R]):
    """A dense row and the 2:4 row that it is to be compared with; None where the record lacks one."""

    label: str
    dense: R | None
    sparse: R | None


def _pairs(rows: Iterable[R], label: Callable[[R], str]) -> list[Pair[R]]:
    """Return the rows of equal label side by side, in the order of their first row; a second row of a variant begins a new pair."""
    slots: dict[tuple[str, int], dict[str, R]] = {}
    for row in rows:
        turn = 0
        while row.variant in slots.get((label(row), turn), {}):
            turn += 1
        slots.setdefault((label(row), turn), {})[row.variant] = row
    return [Pair(name, found.get("dense"), found.get("2:4")) for (name, _), found in slots.items()]


def speed_pairs(report: Report) -> list[Pair[SpeedRow]]:
    """Return the speed rows by backend and batch."""
    return _pairs(report.speed, lambda row: f"{row.backend}, batch {row.batch}")


def memory_pairs(report: Report) -> list[Pair[MemoryRow]]:
    """Return the memory rows by batch."""
    return _pairs(report.memory, lambda row: f"batch {row.batch}")


def size_pairs(report: Report) -> list[Pair[SizeRow]]:
    """Return the files by kind, which is their suffix."""
    return _pairs(report.sizes, lambda row: PurePath(row.file).suffix or row.file)


def headline_speed(report: Report) -> Pair[SpeedRow] | None:
    """Return the pair at the smallest batch that has both variants."""
    whole = [(pair.dense.batch, pair) for pair in speed_pairs(report) if pair.dense and pair.sparse]
    return min(whole, key=lambda item: item[0])[1] if whole else None


def headline_size(report: Report) -> Pair[SizeRow] | None:
    """Return the pair of ONNX files, else the first pair that has both variants."""
    whole = [pair for pair in size_pairs(report) if pair.dense and pair.sparse]
    return next((pair for pair in whole if pair.label == ".onnx"), whole[0] if whole else None)


def accuracy_row(report: Report, variant: str) -> AccuracyRow | None:
    """Return the row of `variant`, None where there is none or it holds no value."""
    return next((row for row in report.accuracy if row.variant == variant and row.values), None)


@dataclass(frozen=True)
class Coverage:
    """How much of the network is 2:4; shares in 0…1, None where nothing was counted."""

    num_layers: int
    num_sparse: int
    share_of_weights: float | None
    share_of_flops: float | None
    kept_magnitude: float | None


def coverage(report: Report) -> Coverage:
    """Return the pruned layers' share of layers, weights and FLOPs, and their kept magnitude weighted by size."""
    sparse = [layer for layer in report.layers if layer.eligible]
    weights = sum(layer.parameters for layer in report.layers)
    flops = sum(layer.flops or 0 for layer in report.layers)
    rated = [(layer.kept_magnitude, layer.parameters) for layer in sparse if layer.kept_magnitude is not None]
    size = sum(parameters for _, parameters in rated)
    return Coverage(
        len(report.layers),
        len(sparse),
        sum(layer.parameters for layer in sparse) / weights if weights else None,
        sum(layer.flops or 0 for layer in sparse) / flops if flops else None,
        sum(kept * parameters for kept, parameters in rated) / size if size else None,
    )


@dataclass(frozen=True)
class OperationShare:
    """Share of an engine's time in one operation, summed over its nodes, in 0…1; None where a variant has no such node."""

    operation: str
    dense: float | None
    sparse: float | None


def share_by_operation(report: Report) -> list[OperationShare]:
    """Return the profile summed by operation, the largest share first.

    NOTE: the engines are profiled one after the other, so their microseconds carry whatever else the machine did; shares do far less.
    """
    sums: dict[str, dict[str, float]] = {}
    for row in report.profile:
        variant = sums.setdefault(row.operation, {})
        variant[row.variant] = variant.get(row.variant, 0.0) + row.share
    rows = [OperationShare(name, found.get("dense"), found.get("2:4")) for name, found in sums.items()]
    return sorted(rows, key=lambda row: -max(row.dense or 0.0, row.sparse or 0.0))


def profile_pairs(report: Report) -> list[Pair[ProfileRow]]:
    """Return the profile by node, the slowest first."""
    pairs = _pairs(report.profile, lambda row: row.node)
    return sorted(pairs, key=lambda pair: -max(row.microseconds for row in (pair.dense, pair.sparse) if row))
