"""Finds a column order in which 2:4 keeps more magnitude.

Two methods. *Assignment*: one column is taken out of every group; where each goes best is a linear assignment problem, solved exactly, so
one round considers (n/4)! orders. Noise added to the values, falling to zero, carries it over local optima. *Annealing*: Metropolis
exchanges of two columns with remembered values, which wins on small weights. The schedule follows from sizes and budget through a fixed
cost model, never from a clock, so a seed gives one result; the clock only cuts a run that is late, and the result says so.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from twofour.errors import InputError
from twofour.pruning.permutation import kernels
from twofour.pruning.permutation.kernels import Fixed, Floats, Ints, fixed_point

# Up to this many columns annealing is used: its table of values is quadratic and the assignment's neighbourhood is still small.
ANNEAL_UP_TO = 256
# Temperatures and noise in standard deviations of the gain of a random exchange; found on the matrices of docs/permutation.md.
HOT, COLD, NOISE = 0.2, 0.06, 0.5
DEFAULT_ROUNDS = 150
DEFAULT_STEPS_A_COLUMN = 50_000


@dataclass(frozen=True)
class Schedule:
    """What a run does: `rounds` assignments or `steps` exchanges."""

    method: str
    count: int
    seconds: float  # expected, by the cost model


@dataclass(frozen=True)
class Found:
    """A column order (old index of each new place) and what it keeps."""

    order: Ints
    kept_before: float
    kept_after: float
    done: int
    planned: int
    seconds: float

    @property
    def complete(self) -> bool:
        """Whether the schedule ran to its end; False when the clock cut it."""
        return self.done >= self.planned


def round_seconds(columns: int, rows: int) -> float:
    """Expected time of one assignment round on one core, in seconds."""
    groups = columns // 4
    return 1.3e-10 * groups * groups * rows + 4e-10 * groups**3 + 2.5e-9 * columns * rows + 1e-4


def step_seconds(rows: int) -> float:
    """Expected time of one exchange on one core, in seconds."""
    return 2.0e-8 + 1e-10 * rows


def schedule(columns: int, rows: int, seconds: float | None) -> Schedule:
    """The work for a weight of `rows` by `columns` and a budget; the same on every machine."""
    if columns <= ANNEAL_UP_TO:
        each, count = step_seconds(rows), DEFAULT_STEPS_A_COLUMN * columns
    else:
        each, count = round_seconds(columns, rows), DEFAULT_ROUNDS
    if seconds is not None:
        # The model is meant for a modest core; planning for 80 % leaves room for a slower one.
        count = max(int(0.8 * seconds / each), 1)
    return Schedule("anneal" if columns <= ANNEAL_UP_TO else "assign", count, count * each)


def magnitude_kept(columns: Floats, order: Ints) -> float:
    """Sum of the two largest of every four columns, over all rows, in float64."""
    groups = columns[order].reshape(len(order) // 4, 4, -1)
    return float(np.partition(groups, 1, axis=1)[:, 2:].sum(dtype=np.float64))


def efficacy_percent(weight: Any, order: Ints) -> float:
    """(kept in this order - kept in plain order) / (kept by the larger half of every row - kept in plain order), in percent.

    Args:
        weight: `[rows, columns]`.
    """
    columns = np.ascontiguousarray(np.abs(weight).T)
    n = columns.shape[0]
    plain = magnitude_kept(columns, np.arange(n))
    ideal = float(np.sort(columns, axis=0)[n // 2 :].sum(dtype=np.float64))
    return 100.0 * (magnitude_kept(columns, order) - plain) / (ideal - plain)


def search(
    columns: Floats,
    *,
    seed: int = 0,
    seconds: float | None = None,
    cut: bool = True,
    device: Any = None,
    progress: Callable[[float], None] | None = None,
) -> Found:
    """An order of the columns that keeps more magnitude under 2:4 than the given one, or the given one.

    Args:
        columns: float32 magnitudes, `[columns, rows]`, a multiple of 4 columns.
        seconds: budget the schedule is made for; None for a fixed schedule by size.
        cut: whether a run later than its budget stops and is marked.
        device: torch device for the assignment values; None computes on the CPU.
        progress: called with the share done, in 0-1.

    Raises:
        InputError: the number of columns is not a multiple of four.
    """
    if columns.ndim != 2 or columns.shape[0] % 4:
        raise InputError(f"columns has shape {list(columns.shape)}, expected [columns, rows] with a multiple of 4 columns to group")
    started = time.monotonic()
    columns = np.ascontiguousarray(columns, np.float32)
    plan = schedule(columns.shape[0], columns.shape[1], seconds)
    identity = np.arange(columns.shape[0], dtype=np.int64)
    before = magnitude_kept(columns, identity)
    if columns.shape[0] < 8 or columns.shape[1] == 0:
        return Found(identity, before, before, 0, 0, time.monotonic() - started)
    deadline = started + seconds if cut and seconds is not None else None
    scaled = fixed_point(columns)
    run = _Anneal(scaled, seed) if plan.method == "anneal" else _Assign(scaled, seed, device)
    done = run.run(plan.count, deadline, progress or (lambda share: None))
    after = magnitude_kept(columns, run.best)
    order = run.best if after > before else identity
    return Found(order, before, max(after, before), done, plan.count, time.monotonic() - started)


class _State:
    """The arrays all loops share, for one matrix."""

    def __init__(self, columns: Fixed, seed: int) -> None:
        n = columns.shape[0]
        self.columns, self.order, self.best = columns, np.arange(n, dtype=np.int64), np.arange(n, dtype=np.int64)
        self.second = np.empty_like(columns)
        self.base, self.kept = np.empty(n, np.int32), np.empty(n // 4, np.int32)
        self.random = np.array([(2 * seed + 1) * 0x9E3779B97F4A7C15 % 2**64], np.uint64)
        self.total = self.refresh()
        gains = np.empty(512)
        kernels.swap_gains(self.columns, self.order, self.second, self.base, self.kept, self.random, gains)
        self.unit = float(gains.std()) or 1.0

    def refresh(self) -> int:
        return int(kernels.refresh_all(self.columns, self.order, self.second, self.base, self.kept))


class _Anneal(_State):
    SLICE = 200_000

    def run(self, steps: int, deadline: float | None, progress: Callable[[float], None]) -> int:
        n = self.columns.shape[0]
        value, stamp, version = np.empty((n, n), np.int32), np.zeros((n, n), np.int32), np.ones(n, np.int32)
        totals = np.array([self.total, self.total], np.int64)
        done = 0
        while done < steps:
            count = min(self.SLICE, steps - done)
            ends = [self.unit * HOT * (COLD / HOT) ** (at / steps) for at in (done, done + count)]
            kernels.anneal(
                self.columns,
                self.order,
                self.best,
                self.second,
                self.base,
                self.kept,
                value,
                stamp,
                version,
                self.random,
                totals,
                count,
                *ends,
            )
            done += count
            progress(done / steps)
            if deadline is not None and time.monotonic() > deadline:
                break
        return done


class _Assign(_State):
    def __init__(self, columns: Fixed, seed: int, device: Any) -> None:
        super().__init__(columns, seed)
        self.rng = np.random.default_rng(seed)
        self.device = device
        self.resident = None if device is None else _Resident(columns, device)

    def run(self, rounds: int, deadline: float | None, progress: Callable[[float], None]) -> int:
        groups = len(self.order) // 4
        values = np.empty((groups, groups), np.float32)
        best = self.total
        for done in range(rounds):
            noise = self.unit * NOISE * max(0.0, 1.0 - done / (0.9 * rounds))
            places = 4 * np.arange(groups) + self.rng.integers(0, 4, groups)
            holes = self.order[places]
            if self.resident is None:
                kernels.hole_values(self.columns, holes, self.second, self.base, values)
            else:
                values = self.resident.hole_values(holes, self.order, self.base)
            judged = values + noise * self.rng.standard_normal(values.shape, np.float32) if noise else values
            self.order[places] = holes[linear_sum_assignment(judged, maximize=True)[1]]
            total = self.refresh()
            if total > best:
                best = total
                self.best = self.order.copy()
            progress((done + 1) / rounds)
            if deadline is not None and time.monotonic() > deadline:
                return done + 1
        return rounds


class _Resident:
    """The same values on a torch device: sum max(y, w) = (sum y + sum w + sum |y - w|) / 2, an L1 distance."""

    def __init__(self, columns: Fixed, device: Any) -> None:
        import torch

        self.columns = torch.from_numpy(columns).to(device).float()
        self.sums = self.columns.sum(1)

    def hole_values(self, holes: Ints, order: Ints, base: Fixed) -> Floats:
        import torch

        held = torch.from_numpy(holes).to(self.columns.device)
        groups = torch.from_numpy(order.reshape(-1, 4)).to(self.columns.device)
        others = groups[groups != held[:, None]].reshape(-1, 3)
        second = self.columns[others].sort(dim=1).values[:, 1]
        distance = torch.cdist(second, self.columns[held], p=1)
        sums = (second.sum(1)[:, None] + self.sums[held][None] + distance) / 2
        values: Floats = (torch.from_numpy(base[holes]).to(sums)[:, None] + sums).float().cpu().numpy()
        return values
