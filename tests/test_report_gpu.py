"""Measuring GPU plans, with a stopwatch that lets no time pass and a GPU made of host memory."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from fake_gpu import FakeGpu
from plan_samples import plan

from twofour.cli.group import twofour as command_line
from twofour.errors import InputError, UnsupportedError
from twofour.plan import Plan
from twofour.report.gpu import measure_gpu
from twofour.runtime import Engine
from twofour.runtime.backends.cuda import CudaBackend
from twofour.timing.gpu import Energy, Figure


class FakeWatch:
    """Figures by order; counts passes."""

    stream = 7

    def __init__(self, device: int = 0, *, trusted: bool = True) -> None:
        self.trusted, self.waited = trusted, 0

    def synchronize(self) -> None:
        self.waited += 1

    def burst(self, graphs: list[Any]) -> list[Figure]:
        for graph in graphs:
            graph.launch()
        return [Figure(500.0 * (i + 1), 0.01, 11) for i in range(len(graphs))]

    def sustained(self, graphs: list[Any]) -> list[Figure]:
        return [Figure(1000.0 * (i + 1), 0.01 if i == 0 else 0.2, 40, 1500.0, 690.0) for i in range(len(graphs))]

    def energy(self, graph: Any) -> Energy:
        if not self.trusted:
            raise UnsupportedError("mean power read 900 W")
        return Energy(0.8, 690.0, 5.0, 1000.0)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    gpu = FakeGpu()
    monkeypatch.setattr("twofour.runtime.engine.make_backend", lambda plan, *rest: CudaBackend(plan, gpu=gpu, make=gpu.make))
    return Engine(plan())


def test_a_row_says_time_latency_energy_and_whether_it_is_stable(engine: Engine) -> None:
    watch: Any = FakeWatch()
    batch = engine.plan.batches[-1]
    first, second = measure_gpu({"off": engine, "auto": engine}, batch=[batch], watch=watch)
    assert (first.name, first.gpu_ms, first.burst_ms, first.items_per_s) == ("off", 1.0, 0.5, batch * 1000.0)
    assert first.joules_per_item == pytest.approx(0.8 / batch)
    assert (first.is_stable, second.is_stable) == (True, False)
    assert 0 < first.p50_ms <= first.p90_ms <= first.p99_ms
    assert first.to_json()["clock_mhz"] == 1500.0
    assert watch.waited > 20


def test_energy_that_cannot_be_trusted_is_none(engine: Engine) -> None:
    watch: Any = FakeWatch(trusted=False)
    (row,) = measure_gpu({"plan": engine}, batch=engine.plan.batches[:1], watch=watch)
    assert row.joules_per_item is None
    (row,) = measure_gpu({"plan": engine}, batch=engine.plan.batches[:1], watch=watch, energy=False)
    assert row.joules_per_item is None


def test_passes_compute_and_go_round_their_sets(engine: Engine) -> None:
    passes = engine.passes(engine.plan.batches[0], sets=2)
    for _ in range(3):
        passes(7)
    assert passes._next == 1
    with pytest.raises(InputError, match="batch 999 was asked for, the plan was built for"):
        engine.passes(999)


def test_the_command_measures_gpu_plans_and_refuses_a_mixture(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, other = tmp_path / "gpu.plan", tmp_path / "net.onnx"
    plan().save(path)
    other.write_bytes(b"")
    monkeypatch.setattr("twofour.report.gpu.Stopwatch", FakeWatch)
    size = str(engine.plan.batches[0])
    shown = CliRunner(env={"COLUMNS": "200"}).invoke(command_line, ["measure", str(path), "--batch", size], catch_exceptions=False)
    assert "1500 MHz, 690 W" in shown.output
    read = json.loads(CliRunner().invoke(command_line, ["measure", str(path), "--batch", size, "--json"]).output)
    assert read[0]["gpu_ms"] == 1.0
    own = json.loads(CliRunner().invoke(command_line, ["measure", str(path), "--json"], catch_exceptions=False).output)
    assert tuple(row["batch"] for row in own) == engine.plan.batches
    none = CliRunner().invoke(command_line, ["measure", str(path), "--batch", ""])
    assert "no batch size is given" in str(none.exception)
    mixed = CliRunner().invoke(command_line, ["measure", str(path), str(other)])
    assert "runs on a GPU and other files on the CPU, expected one kind" in str(mixed.exception)


def test_a_cpu_plan_has_no_passes() -> None:
    cpu = object.__new__(Engine)
    cpu.plan = dataclasses.replace(plan(), backend="onnxruntime")
    cpu._backend = SimpleNamespace()  # type: ignore[assignment]
    with pytest.raises(InputError, match="expected a GPU plan: this one runs on the CPU"):
        cpu.passes(1)
    assert isinstance(cpu.plan, Plan)
