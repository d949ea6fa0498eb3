"""evidence/methods.py: a row that fails costs no other row, and a second run goes on where the first one ended."""

import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from itertools import accumulate
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from twofour.pattern import Pattern
from twofour.pruning.decide import chosen
from twofour.pruning.methods import METHODS
from twofour.pruning.statistics import Part, Statistics

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def evidence() -> Iterator[Callable[[str], ModuleType]]:
    sys.path.insert(0, str(ROOT / "evidence"))
    try:
        yield importlib.import_module
    finally:
        sys.path.remove(str(ROOT / "evidence"))


@pytest.fixture(scope="module")
def methods(evidence: Callable[[str], ModuleType]) -> ModuleType:
    return evidence("methods")


def row(key: Any, **more: Any) -> dict[str, Any]:
    method = "" if key.method == "dense" else key.method
    return {"net": key.net, "method": method, "permuted": key.permuted, "seed": key.seed, "value": 1.0, **more}


def test_failed_rows_are_left_out_and_tried_again(methods: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "apart", lambda measured, *arguments: measured(*arguments))
    keys = methods.wanted(["ResNet-20"], False, False)
    out, broken = tmp_path / "results" / "m.json", {"wanda", "dense"}
    tried: list[Any] = []
    written: list[int] = []
    real = methods.write

    def write(path: Path, rows: list[dict[str, Any]]) -> None:
        written.append(len(rows))
        real(path, rows)

    monkeypatch.setattr(methods, "write", write)

    def measured(folder: Path, key: Any, device: str) -> list[dict[str, Any]]:
        tried.append(key)
        if key.method in broken:
            raise RuntimeError("no memory")
        return [row(key)]

    failed = methods.measure_all(tmp_path, out, keys, jobs=1, device="cpu", measured=measured)
    assert {key.method for key in failed} == broken
    assert written == list(range(1, 1 + len(keys) - len(broken)))
    assert [methods.Key.of(r) for r in json.loads(out.read_text())["rows"]] == [key for key in keys if key.method not in broken]
    result = json.loads(out.read_text())
    here = {"cpu": result["machine"]["cpu"], "cores": os.cpu_count(), "torch": torch.__version__}
    assert all(r["machine"] == here for r in result["rows"])
    elsewhere = {"cpu": "another", "cores": 1, "torch": "1.0"}
    result["rows"][0]["machine"] = elsewhere
    out.write_text(json.dumps(result))
    tried.clear()
    broken.clear()
    assert methods.measure_all(tmp_path, out, keys, jobs=1, device="cpu", measured=measured) == []
    assert {key.method for key in tried} == {"wanda", "dense"}
    machines = {methods.Key.of(r).method: r["machine"] for r in json.loads(out.read_text())["rows"]}
    assert machines == {key.method: elsewhere if key.method == "magnitude" else here for key in keys}
    assert [methods.Key.of(r) for r in json.loads(out.read_text())["rows"]] == keys


def test_a_row_that_dies_does_not_take_others_along(methods: ModuleType) -> None:
    with pytest.raises(BrokenProcessPool):
        methods.apart(os._exit, 3)
    assert methods.apart(list, "ab") == ["a", "b"]


def test_a_retrained_row_of_another_recipe_is_measured_again(methods: ModuleType) -> None:
    key = methods.Key("ResNet-20", "magnitude", seed=0)
    recipe = methods.methods_retrained.told(methods.methods_retrained.RECIPE)
    assert methods.is_current(row(key, recipe=recipe, sources_digest="d"), "d")
    assert not methods.is_current(row(key, recipe={**recipe, "lr": 1.0}, sources_digest="d"), "d")
    assert not methods.is_current(row(key, recipe=recipe, sources_digest="other"), "d")


def test_the_recorded_rows_are_of_the_recipe_of_today(methods: ModuleType) -> None:
    rows = json.loads((ROOT / "results" / "cpu" / "methods.json").read_text())["rows"]
    assert [methods.Key.of(row) for row in rows if not methods.is_current(row, row["sources_digest"])] == []
    told = methods.methods_retrained.told(methods.methods_retrained.Recipe(lr=0.5, method="alps"))
    assert told["lr"] == 0.5
    assert "method" not in told


def test_one_shot_accuracy_is_not_measured_with_fewer_images_than_it_records(
    evidence: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = evidence("accuracy_oneshot")
    out = tmp_path / "out.json"
    monkeypatch.setattr(module, "read", lambda *arguments: (torch.zeros(2500, 3, 1, 1), torch.zeros(2500)))
    monkeypatch.setattr(sys, "argv", ["accuracy_oneshot.py", str(tmp_path), str(out)])
    with pytest.raises(SystemExit, match=r"cifar10 holds 2,500 training images, expected 10,000 or more; add tr_\*\.webp"):
        module.main()
    assert not out.exists()


def test_two_networks_and_two_methods_are_retrained(methods: ModuleType) -> None:
    keys = [key for key in methods.wanted(list(methods.NETWORKS), True, True) if key.seed is not None]
    assert {(key.net, key.method) for key in keys} == {
        (net, method) for net in ("ResNet-20", "ResNet-56") for method in ("dense", "magnitude", "sparsegpt")
    }
    assert {key.seed for key in keys} == {0, 1, 2}
    assert len(set(methods.wanted(list(methods.NETWORKS), True, True))) == len(methods.wanted(list(methods.NETWORKS), True, True))


@pytest.mark.parametrize(("out", "columns", "float64_up_to"), [(512, 128, 4096), (128, 512, 4096), (128, 512, 256), (768, 384, 256)])
def test_choosing_takes_the_memory_that_is_computed(
    evidence: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, out: int, columns: int, float64_up_to: int
) -> None:
    """The peak of what torch allocated and freed, to the few bytes of scalars."""
    for module in ("statistics", "decide"):
        monkeypatch.setattr(f"twofour.pruning.{module}.FLOAT64_UP_TO", float64_up_to)
    torch.manual_seed(0)
    statistics = Statistics.zero(columns, torch.device("cpu"), hessian=True)
    statistics.add(torch.randn(2 * columns, columns))
    weight, parts = torch.randn(out, columns, dtype=torch.bfloat16), [Part(0, out, statistics)]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        chosen(weight, parts, METHODS["sparsegpt"], Pattern.parse("2:4"), "weight")
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    peak = max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
    assert peak == pytest.approx(evidence("blocks_memory").choosing(out, columns), rel=0.01)


def test_the_recorded_terms_are_those_computed_today(evidence: Callable[[str], ModuleType]) -> None:
    memory = evidence("blocks_memory")
    for path in sorted((ROOT / "results").glob("*/blocks-memory.json")):
        for row in json.loads(path.read_text())["rows"]:
            assert row["expected"] == memory.expected(memory.SHAPES[row["shape"]], row["tokens"]), path
