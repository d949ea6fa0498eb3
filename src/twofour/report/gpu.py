"""`measure` of GPU plans: GPU time sustained and in a burst, latency of single calls, energy an item; by `timing/gpu.py`."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from twofour.errors import UnsupportedError
from twofour.plan import Plan
from twofour.runtime import Engine
from twofour.timing.gpu import Stopwatch

CALLS = 200  # single calls whose latency is taken, at most; fewer where they take long
CALLS_S = 2.0


@dataclass(frozen=True)
class GpuMeasurement:
    """One GPU plan at one batch size.

    Attributes:
        gpu_ms, spread, n: of whole passes back to back once the power limit has settled the clock, a pass each from device memory to
            device memory; `spread` is the interquartile range over the median. burst_ms: at full clock.
        p50_ms, p90_ms, p99_ms: a call until its result is there, calls one after another, inputs on the device.
        joules_per_item, power_w: over a window of at least 5 s; None where it was not asked for or the reading cannot be trusted.
        is_stable: whether the spread is within the protocol's limit.
    """

    name: str
    batch: int
    precision: str
    sparsity: str
    gpu_ms: float
    spread: float
    n: int
    burst_ms: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    items_per_s: float
    clock_mhz: float
    power_w: float
    joules_per_item: float | None
    is_stable: bool

    def __str__(self) -> str:
        energy = "" if self.joules_per_item is None else f", {1e3 * self.joules_per_item:.1f} mJ an item"
        return (
            f"GpuMeasurement({self.name}, batch {self.batch}: {self.gpu_ms:.3f} ms, {self.items_per_s:,.0f} items/s, "
            f"p99 {self.p99_ms:.3f} ms{energy}, n {self.n}, spread {100 * self.spread:.1f} %)"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the measurement as plain JSON values."""
        return asdict(self)


class _OnStream:
    """Passes of an engine on the stopwatch's stream, in place of a graph of them: a pass launches graphs of its own."""

    calls = 1

    def __init__(self, put: Any, stream: int) -> None:
        self._put, self._stream = put, stream

    def launch(self) -> None:
        """Put one pass on the stream."""
        self._put(self._stream)

    def close(self) -> None:
        """Do nothing: the engine owns its graphs."""


def measure_gpu(
    engines: Mapping[str, Engine], *, batch: Sequence[int], energy: bool = True, watch: Stopwatch | None = None, device: int = 0
) -> list[GpuMeasurement]:
    """Return one row an engine and batch size; the engines, all on GPU `device`, take turns.

    Raises:
        InputError: an engine runs on the CPU, or has no such batch size. UnsupportedError, MissingExtraError: clock or power is not read.
    """
    watch = watch or Stopwatch(device)
    rows = []
    for size in batch:
        passes = {name: _OnStream(engine.passes(size), int(watch.stream)) for name, engine in engines.items()}
        graphs: Any = list(passes.values())
        for one in graphs:
            one.launch()
        watch.synchronize()
        burst = dict(zip(passes, watch.burst(graphs), strict=True))
        sustained = dict(zip(passes, watch.sustained(graphs), strict=True))
        for name, engine in engines.items():
            waits = _latencies_ms(passes[name], watch)
            joules = _joules(watch, passes[name]) if energy else None
            figure = sustained[name]
            rows.append(
                GpuMeasurement(
                    name=name,
                    batch=size,
                    precision=engine.plan.precision,
                    sparsity=engine.plan.sparsity,
                    gpu_ms=figure.median_us / 1e3,
                    spread=figure.spread,
                    n=figure.n,
                    burst_ms=burst[name].median_us / 1e3,
                    p50_ms=waits[len(waits) // 2],
                    p90_ms=waits[int(0.9 * (len(waits) - 1))],
                    p99_ms=waits[int(0.99 * (len(waits) - 1))],
                    items_per_s=1e6 * size / figure.median_us,
                    clock_mhz=figure.clock_mhz,
                    power_w=figure.power_w,
                    joules_per_item=None if joules is None else joules / size,
                    is_stable=figure.is_stable,
                )
            )
    return rows


def device_bytes(plan: Plan, batch: int) -> int:
    """Return the device memory that a GPU plan takes for one batch size: weights, activations and workspace."""
    program = next(program for program in plan.programs if program.batch == batch)
    tensors = {value.tensor for value in program.values.values() if value.where == "weights" and value.tensor is not None}
    return sum(plan.payload[name].nbytes for name in tensors) + program.arena_bytes + program.workspace_bytes


def _latencies_ms(passes: _OnStream, watch: Stopwatch) -> list[float]:
    """Sorted wall times of single passes, each waited for."""
    taken: list[float] = []
    end = time.perf_counter() + CALLS_S
    while len(taken) < 10 or (len(taken) < CALLS and time.perf_counter() < end):
        begin = time.perf_counter()
        passes.launch()
        watch.synchronize()
        taken.append(1e3 * (time.perf_counter() - begin))
    return sorted(taken)


def _joules(watch: Stopwatch, passes: Any) -> float | None:
    """Energy of a pass, None where the reading cannot be trusted."""
    try:
        return watch.energy(passes).joules
    except UnsupportedError:
        return None
