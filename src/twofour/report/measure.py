"""`measure`: latency, throughput and memory of engines, candidates interleaved."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from twofour.builder import build
from twofour.errors import InputError
from twofour.files import existing_file
from twofour.plan import Plan
from twofour.runtime import Engine
from twofour.runtime.memory import measure_peak_bytes
from twofour.timing import Timing, time_interleaved


@dataclass(frozen=True)
class Measurement:
    """One thing at one batch size. Times in milliseconds; spread = (p90 − p10) / median; memory None where it was not asked for."""

    name: str
    backend: str
    batch: int
    n: int
    median_ms: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    spread: float
    items_per_s: float
    peak_bytes: int | None = None

    def __str__(self) -> str:
        return (
            f"Measurement({self.name}, batch {self.batch}: {self.median_ms:.3f} ms, p90 {self.p90_ms:.3f}, p99 {self.p99_ms:.3f}, "
            f"{self.items_per_s:,.0f} items/s, n {self.n}, spread {100 * self.spread:.0f} %)"
        )

    @classmethod
    def of(cls, name: str, backend: str, batch: int, timing: Timing, peak_bytes: int | None = None) -> "Measurement":
        """Return the measurement in a Timing of whole batches."""
        p50, p90, p99 = (1e3 * timing.percentile(q) for q in (50, 90, 99))
        return cls(
            name, backend, batch, timing.num_samples, 1e3 * timing.median, p50, p90, p99, timing.spread, batch / timing.median, peak_bytes
        )

    def to_json(self) -> dict[str, Any]:
        """Return the measurement as plain JSON values."""
        return asdict(self)


def plan_of(thing: str | Path | Plan) -> Plan:
    """Return the plan of a plan file, an ONNX file (built with the defaults) or a Plan.

    Raises:
        InputError: the file is missing or neither.
    """
    if isinstance(thing, Plan):
        return thing
    path = existing_file(thing, "measure: file")
    return build(path) if path.suffix == ".onnx" else Plan.load(path)


def measure(
    things: str | Path | Plan | Mapping[str, str | Path | Plan] | Sequence[str | Path],
    *,
    batch: Sequence[int] = (1, 32),
    seconds: float = 2.0,
    memory: bool = True,
) -> list[Measurement]:
    """Return one Measurement a thing and batch size, all things of a batch size timed in turn in this process.

    Args:
        things: plans or ONNX files; a mapping gives them names.
        seconds: time for each batch size, all things together, after a warm-up.
        memory: also measure the peak memory of each, in a process of its own.

    Raises:
        InputError: a file is missing or neither plan nor ONNX, a batch below 1, two things of one name.
    """
    if isinstance(things, str | Path | Plan):
        things = {_name(things): things}
    elif not isinstance(things, Mapping):
        named = {_name(thing): thing for thing in things}
        if len(named) < len(things):
            raise InputError("measure: two of the files are the same, expected each once")
        things = named
    if not things or not batch or any(b < 1 for b in batch):
        raise InputError(f"measure: {len(things)} things at batch {list(batch)}, expected at least one thing and sizes of 1 or more")
    plans = {name: plan_of(thing) for name, thing in things.items()}
    engines = {name: Engine(plan) for name, plan in plans.items()}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{i}.plan" for i, name in enumerate(plans)}
        if memory:
            for name, plan in plans.items():
                plan.save(files[name])
        for size in batch:
            calls = {}
            for name, engine in engines.items():
                inputs = engine.random_inputs(size)
                calls[name] = lambda engine=engine, inputs=inputs: engine(*inputs)
            timings = time_interleaved(calls, seconds=seconds)
            for name, timing in timings.items():
                peak = measure_peak_bytes(files[name], size) if memory else None
                rows.append(Measurement.of(name, plans[name].backend, size, timing, peak))
    return rows


def _name(thing: str | Path | Plan) -> str:
    return "plan" if isinstance(thing, Plan) else str(thing)
