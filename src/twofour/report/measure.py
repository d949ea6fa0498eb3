"""`measure`: latency, throughput and memory of engines, candidates interleaved."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from twofour.builder import build
from twofour.builder.batches import BATCHES, batch_sizes
from twofour.errors import InputError
from twofour.files import existing_file
from twofour.plan import Plan
from twofour.runtime import Engine
from twofour.runtime.memory import measure_peak_bytes
from twofour.timing import Timing, time_interleaved


@dataclass(frozen=True)
class Measurement:
    """One thing at one batch size. Times in milliseconds; spread = (p90 − p10) / median; memory None where it was not asked for.

    Of a GPU plan: p50, p90 and p99 are of single calls; `pass_ms`, n, spread (interquartile range over median) and items a second are of
    passes back to back once the clock has settled. Energy is None where it was not counted or its reading cannot be trusted.
    """

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
    pass_ms: float | None = None
    burst_ms: float | None = None
    joules_per_item: float | None = None
    clock_mhz: float | None = None
    power_w: float | None = None

    def __str__(self) -> str:
        if self.pass_ms is not None:
            energy = "" if self.joules_per_item is None else f", {1e3 * self.joules_per_item:.3g} mJ an item"
            return (
                f"Measurement({self.name}, batch {self.batch}: a pass {self.pass_ms:.3f} ms, {self.items_per_s:,.0f} items/s{energy}, "
                f"n {self.n}, spread {100 * self.spread:.0f} %; a call {self.p50_ms:.3f} ms, p99 {self.p99_ms:.3f})"
            )
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


def batches_of(plans: Mapping[str, Plan]) -> tuple[int, ...]:
    """Return the batch sizes that are meant where none are given: those that every plan was made for, else 1 and 32.

    A GPU plan was made for its programs' sizes, another for the one that its inputs are fixed to, if any.

    Raises:
        InputError: the plans share none.
    """
    made = {name: plan.batches if plan.backend == "cuda" else plan.fixed_batches[:1] for name, plan in plans.items()}
    own = {name: sizes for name, sizes in made.items() if sizes}
    if not own:
        return BATCHES
    shared = [size for size in next(iter(own.values())) if all(size in sizes for sizes in own.values())]
    if not shared:
        said = ", ".join(f"{name!r} {list(sizes)}" for name, sizes in own.items())
        raise InputError(f"measure: no batch size is one of every plan's ({said}), expected one; measure them apart")
    return tuple(shared)


def measure(
    things: str | Path | Plan | Mapping[str, str | Path | Plan] | Sequence[str | Path],
    *,
    batch: int | Sequence[int] | None = None,
    seconds: float = 2.0,
    memory: bool = True,
    device: int = 0,
) -> list[Measurement]:
    """Return one Measurement a thing and batch size, all things of a batch size timed in turn in this process.

    GPU plans are timed by the protocol of `timing/gpu.py`, which takes the time that it needs.

    Args:
        things: plans or ONNX files; a mapping gives them names.
        batch: batch size or sizes; by default those that the files were made for, else 1 and 32.
        seconds: time for each batch size, all things together, after a warm-up.
        memory: also measure the peak memory of each, in a process of its own; of a GPU plan it is the device memory that it takes.
        device: number of the GPU for GPU plans.

    Raises:
        InputError: a file is missing or neither plan nor ONNX, no batch size or one that no tensor has, two things of one name, plans of
            both kinds.
    """
    if isinstance(things, str | Path | Plan):
        things = {_name(things): things}
    elif not isinstance(things, Mapping):
        named = {_name(thing): thing for thing in things}
        if len(named) < len(things):
            raise InputError("measure: two of the files are the same, expected each once")
        things = named
    sizes = batch_sizes(batch, "measure")
    if not things:
        raise InputError("measure: no plan or ONNX file is given, expected at least one")
    plans = {name: plan_of(thing) for name, thing in things.items()}
    if on_gpu := [name for name, plan in plans.items() if plan.backend == "cuda"]:
        if len(on_gpu) < len(plans):
            raise InputError(f"measure: {on_gpu[0]!r} runs on a GPU and others on the CPU, expected one kind; measure them apart")
        return _on_gpu(plans, sizes or batches_of(plans), memory, device)
    engines = {name: Engine(plan) for name, plan in plans.items()}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{i}.plan" for i, name in enumerate(plans)}
        if memory:
            for name, plan in plans.items():
                plan.save(files[name])
        for size in sizes or batches_of(plans):
            calls = {}
            for name, engine in engines.items():
                inputs = engine.random_inputs(size)
                calls[name] = lambda engine=engine, inputs=inputs: engine(*inputs)
            timings = time_interleaved(calls, seconds=seconds)
            for name, timing in timings.items():
                peak = measure_peak_bytes(files[name], size) if memory else None
                rows.append(Measurement.of(name, plans[name].backend, size, timing, peak))
    return rows


def _on_gpu(plans: Mapping[str, Plan], batch: Sequence[int], memory: bool, device: int) -> list[Measurement]:
    """The measurements of GPU plans."""
    from twofour.report import gpu

    rows = []
    for m in gpu.measure_gpu({name: Engine(plan, device=device) for name, plan in plans.items()}, batch=batch, device=device):
        plan = plans[m.name]
        rows.append(
            Measurement(
                m.name,
                plan.backend,
                m.batch,
                m.n,
                m.p50_ms,
                m.p50_ms,
                m.p90_ms,
                m.p99_ms,
                m.spread,
                m.items_per_s,
                peak_bytes=gpu.device_bytes(plan, m.batch) if memory else None,
                pass_ms=m.gpu_ms,
                burst_ms=m.burst_ms,
                joules_per_item=m.joules_per_item,
                clock_mhz=m.clock_mhz,
                power_w=m.power_w,
            )
        )
    return rows


def _name(thing: str | Path | Plan) -> str:
    return "plan" if isinstance(thing, Plan) else str(thing)
