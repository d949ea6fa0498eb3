"""evidence/methods.py: a row that fails costs no other row, and a second run goes on where the first one ended."""

import importlib
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def methods() -> Iterator[ModuleType]:
    sys.path.insert(0, str(ROOT / "evidence"))
    try:
        yield importlib.import_module("methods")
    finally:
        sys.path.remove(str(ROOT / "evidence"))


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
    recipe = methods.asdict(methods.methods_retrained.RECIPE)
    assert methods.is_current(row(key, recipe=recipe, sources_digest="d"), "d")
    assert not methods.is_current(row(key, recipe={**recipe, "lr": 1.0}, sources_digest="d"), "d")
    assert not methods.is_current(row(key, recipe=recipe, sources_digest="other"), "d")


def test_two_networks_and_two_methods_are_retrained(methods: ModuleType) -> None:
    keys = [key for key in methods.wanted(list(methods.NETWORKS), True, True) if key.seed is not None]
    assert {(key.net, key.method) for key in keys} == {
        (net, method) for net in ("ResNet-20", "ResNet-56") for method in ("dense", "magnitude", "sparsegpt")
    }
    assert {key.seed for key in keys} == {0, 1, 2}
    assert len(set(methods.wanted(list(methods.NETWORKS), True, True))) == len(methods.wanted(list(methods.NETWORKS), True, True))
