"""evidence/engine.py: which rows are kept, how new ones join them, what the summary and the tables say of them."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from script_loader import load_script
from torch import nn

from twofour.errors import InputError

ROOT = Path(__file__).parent.parent
SOURCES, VERSIONS = {"gemm": "a"}, {"torch": "2"}


@pytest.fixture(scope="module")
def rows() -> Iterator[ModuleType]:
    sys.path.insert(0, str(ROOT / "evidence"))
    try:
        yield importlib.import_module("engine_rows")
    finally:
        sys.path.remove(str(ROOT / "evidence"))


@pytest.fixture(scope="module")
def engine(rows: ModuleType) -> ModuleType:
    return importlib.import_module("engine")


def row(variant: str, ms: float = 2.0, net: str = "ResNet-50", batch: int = 256, **more: Any) -> dict[str, Any]:
    found = {"net": net, "batch": batch, "precision": "fp16", "variant": variant, "sources": SOURCES, "versions": VERSIONS}
    found |= {"ms": ms, "spread": 0.01, "n": 40, "is_stable": True, "items_per_s": 1e3 * batch / ms, "joules_per_item": 0.02}
    found |= {"gpu": "GPU", "driver": "1", "power_limit_w": 700.0, "clock_mhz": 1500.0}
    found["agreement"] = {"error": 1e-3, "torch_error": 2e-3, "top1": 1.0, "torch_top1": 1.0, "items": batch}
    if variant != "torch.compile":
        found |= {"layers": 60, "layers_24": 40 if variant == "2:4" else 0, "peak_bytes": 2_000_000, "bound_bytes": 2_000_000}
        found |= {"build_first_s": 80.0, "build_cached_s": 3.0, "load_s": 0.5}
    return found | more


def test_only_what_is_absent_changed_or_asked_for_is_measured(rows: ModuleType) -> None:
    group = rows.Group("ResNet-50", 256, "fp16")
    every = [row(variant) for variant in rows.VARIANTS]
    missing = lambda found, **more: rows.missing(group, found, SOURCES, VERSIONS, **more)  # noqa: E731 - the same arguments each time
    assert missing([]) == ("torch.compile", "off", "2:4")
    assert missing([], peer=False) == ("off", "2:4")
    assert missing(every) == ()
    assert missing(every[:2]) == ("off", "2:4"), "engines that are compared are measured together"
    assert missing(every[1:]) == ("torch.compile",)
    assert missing([{**r, "sources": {"gemm": "b"}} for r in every]) == ("off", "2:4"), "torch.compile runs none of our kernels"
    assert missing([{**r, "versions": {"torch": "3"}} for r in every]) == ("torch.compile", "off", "2:4")
    assert missing([row(variant, batch=1) for variant in rows.VARIANTS]) == ("torch.compile", "off", "2:4")
    failed = [*every[:2], {**every[2], "error": "no memory"}]
    assert missing(failed) == ()
    assert missing(failed, retry_failed=True) == ("off", "2:4")


def test_new_rows_take_the_place_of_old_ones_in_the_file_of_several_writers(rows: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "results" / "engine.json"
    rows.add(path, {"machine": {}, "date": "2026", "command": "c"}, [row("2:4", net="ViT-B/16", batch=64), row("2:4")])
    rows.add(path, {"machine": {}, "date": "2027", "command": "d"}, [row("off", 3.0), row("2:4", 1.5)])
    stored = json.loads(path.read_text())
    assert [(r["net"], r["variant"], r["ms"]) for r in stored["rows"]] == [
        ("ResNet-50", "off", 3.0),
        ("ResNet-50", "2:4", 1.5),
        ("ViT-B/16", "2:4", 2.0),
    ]
    assert (stored["kind"], stored["date"], stored["command"]) == ("engine", "2027", "d --nets ResNet-50 ViT-B/16")
    assert [entry["time_24_over_off"] for entry in stored["summary"]] == [0.5, None]
    assert rows.read(path) == stored
    assert rows.read(tmp_path / "none.json")["rows"] == []
    path.write_text('{"schema": 1, "kind": "gemm", "rows": []}')
    with pytest.raises(InputError, match="holds 'gemm' results of schema 1, expected 'engine' of 1"):
        rows.read(path)
    path.write_text("[")
    with pytest.raises(InputError, match="is no results file"):
        rows.read(path)


@pytest.mark.parametrize(("ms", "never_slower"), [(1.9, True), (2.019, True), (2.03, False)])
def test_slower_than_its_own_dense_build_beyond_noise_is_said(rows: ModuleType, ms: float, never_slower: bool) -> None:
    (entry,) = rows.summary([row("torch.compile", 4.0), row("off", 2.0), row("2:4", ms)])
    assert entry["never_slower"] is never_slower
    assert entry["noise"] == 0.01
    assert (entry["off_over_torch_compile"], entry["sparse_over_torch_compile"]) == (2.0, 4.0 / ms)


def test_noise_is_never_less_than_what_the_protocol_calls_settled(rows: ModuleType) -> None:
    (entry,) = rows.summary([row("off", 2.0, spread=0.0), row("2:4", 2.0 * 1.005, spread=0.0)])
    assert entry["noise"] == rows.SETTLED
    assert entry["never_slower"]


def test_a_failed_row_has_no_ratio_and_its_sentence(rows: ModuleType) -> None:
    failed = {name: value for name, value in row("2:4").items() if name != "ms"} | {"error": "InputError: no tactic"}
    (entry,) = rows.summary([row("off"), failed])
    assert entry["never_slower"] is None
    assert entry["failed"] == {"2:4": "InputError: no tactic"}
    recorded = {"date": "2026-11-22T00", "command": "c", "rows": [row("off"), failed]}
    assert rows.short_table(recorded, SOURCES) == rows.NO_ROWS
    assert "- ResNet-50 batch 256 fp16, 2:4: InputError: no tactic" in rows.full_table(recorded, SOURCES)


def test_the_tables_show_the_rows_of_the_present_kernels_only(rows: ModuleType) -> None:
    own = [row("torch.compile", 4.0), row("off", 2.0), row("2:4", 1.6)]
    single = [row("off", 0.4, batch=1), row("2:4", 0.3, batch=1)]
    stale = [row(variant, net="ViT-B/16", batch=64, sources={"gemm": "old"}) for variant in rows.VARIANTS]
    recorded = {"date": "2026-11-22T00:00", "command": "python evidence/engine.py out", "rows": own + single + stale}
    short = rows.short_table(recorded, SOURCES).splitlines()
    assert short[2] == "| ResNet-50 | 256 | 64,000 | 128,000 | 160,000 | **2.50** | 20.00 → 20.00 |"
    assert short[3] == "| ResNet-50 | 1 | – | 0.400 ms | 0.300 ms | – | – → 20.00 |"
    assert short[-1] == "GPU, driver 1, power limit 700 W; torch 2; 2026-11-22; `python evidence/engine.py out`."
    full = rows.full_table(recorded, SOURCES)
    assert "ViT" not in full
    assert (
        "| ResNet-50, 256, fp16 | 2:4 | 1.600 ± 1.0 % | 40 | 160,000 | 20.00 | 1500 | 40 of 60 | 2.0 (2.0) | 1.0e-03, 2.0e-03 | 100.0 % "
        "| 80.0, 3.0 | 0.5 |"
    ) in full
    assert "| ResNet-50, 256, fp16 | torch.compile | 4.000 ± 1.0 % | 40 | 64,000 | 20.00 | 1500 | – | – |" in full
    assert {line.count("|") for line in full.splitlines() if line.startswith("|")} == {14}
    assert rows.short_table({"rows": stale}, SOURCES) == rows.NO_ROWS


def test_the_tables_say_on_which_days_rows_were_measured(rows: ModuleType) -> None:
    found = [row("torch.compile", 4.0) | {"date": "2026-11-01T10"}, *(row(v) | {"date": "2026-11-03T10"} for v in ("off", "2:4"))]
    recorded = {"date": "2026-11-04T00:00", "command": "c", "rows": [*found, row("off", batch=1), row("2:4", batch=1)]}
    for table in (rows.short_table(recorded, SOURCES), rows.full_table(recorded, SOURCES)):
        assert table.endswith("; 2026-11-03, 2026-11-04, torch.compile 2026-11-01; `c`.")


def test_groups_are_named_dealt_out_and_refused(rows: ModuleType) -> None:
    every = rows.groups([], [], ["fp16"])
    shards = [rows.groups([], [], ["fp16"], (i, 2)) for i in (1, 2)]
    assert sorted(map(str, every)) == sorted(str(group) for shard in shards for group in shard)
    assert str(every[0]) == "ResNet-50 batch 256 fp16"
    chosen = rows.groups(["resnet50", "ViT-B/16"], [8], ["fp16", "bf16"])
    assert [str(group) for group in chosen] == [
        *("ResNet-50 batch 8 fp16", "ResNet-50 batch 8 bf16"),
        *("ViT-B/16 batch 8 fp16", "ViT-B/16 batch 8 bf16"),
    ]
    with pytest.raises(InputError, match="--nets 'resnet5' is unknown, expected one of"):
        rows.groups(["resnet5"], [], ["fp16"])
    with pytest.raises(InputError, match="--shard 3/2: expected i/n with i from 1 to n"):
        rows.groups([], [], ["fp16"], rows.parse_shard("3/2"))
    with pytest.raises(InputError, match="--shard 'first': expected i/n, like 1/2"):
        rows.parse_shard("first")


def test_a_group_that_fails_or_comes_too_late_is_not_lost(engine: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = engine.engine_rows.groups(["resnet50", "mobilenet_v2"], [8], ["fp16"])
    (tmp_path / "machine.json").write_text('{"gpu": "GPU", "driver": "1", "power_limit_w": 700.0}')
    monkeypatch.setattr(engine, "is_ready", lambda folder: "mobilenet" not in folder.name)
    monkeypatch.setattr(engine, "prepare_all", lambda run, nets: dict.fromkeys(nets, "RuntimeError: no export"))

    def dies(*arguments: Any) -> None:
        raise RuntimeError("the process died\nwith a long story")

    monkeypatch.setattr(engine, "in_child", dies)
    run = engine.Run(tmp_path / "engine.json", tmp_path, tmp_path / "cache", "c", 0.0, None)
    engine.measure_all(run, dict.fromkeys(groups, ("off", "2:4")))
    stored = json.loads((tmp_path / "engine.json").read_text())["rows"]
    assert {(r["net"], r["error"]) for r in stored} == {
        ("ResNet-50", "RuntimeError: the process died"),
        ("MobileNetV2", "RuntimeError: no export"),
    }
    assert len(stored) == 4
    with pytest.raises(engine.TimeIsUp):
        engine.measure_all(engine.Run(tmp_path / "late.json", tmp_path, tmp_path / "cache", "c", 0.0, 1.0), dict.fromkeys(groups, ("off",)))
    assert not (tmp_path / "late.json").exists()


def test_the_recorded_command_names_what_was_measured_and_no_folder(engine: ModuleType) -> None:
    asked: dict[str, Any] = {"out": Path("/home/me/engine.json"), "work": Path("/home/me/work"), "minutes": 4.5, "no_peer": False}
    options = SimpleNamespace(**asked, nets=["ViT-B/16"], batches=[8, 16], precisions=["fp16"])
    assert engine.command_of(options) == "python evidence/engine.py engine.json --batches 8 16"
    options = SimpleNamespace(**asked | {"no_peer": True}, nets=[], batches=[], precisions=["bf16"])
    assert engine.command_of(options) == "python evidence/engine.py engine.json --precisions bf16 --no-peer"


def test_agreement_and_the_peers_folding(engine: ModuleType) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()).eval()
    model[1].running_mean.normal_()  # type: ignore[operator,union-attr]
    x = torch.randn(2, 3, 8, 8)
    folded = engine.folded(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    with torch.no_grad():
        assert engine.relative_error(folded(x), model(x)) < 1e-5
    wanted = torch.tensor([[1.0, 2.0], [4.0, 3.0]])
    found = engine.agreement(wanted + torch.tensor([[0.0, 0.4], [0.0, 1.2]]), wanted, wanted)
    assert found == pytest.approx({"error": 0.3, "torch_error": 0.0, "top1": 0.5, "torch_top1": 1.0, "items": 2})


def test_layer_scales_near_zero_and_empty_heads_are_woken(engine: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer_scale = nn.Parameter(torch.full((4, 1, 1), 1e-6))
            self.head = nn.Linear(4, 2)
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    class Source:
        @staticmethod
        def make(classes: int) -> nn.Module:
            return Net()

    monkeypatch.setattr(engine, "resolve_model", lambda spec: Source)
    model = engine.make_network("ResNet-50")
    assert torch.equal(model.layer_scale, torch.full((4, 1, 1), 0.1))
    assert model.head.weight.all()
    assert not model.head.bias.any()


def test_a_soak_in_parts_passes_when_the_minutes_are_full_and_results_alike() -> None:
    soak = load_script("engine_soak", "benchmarks")
    part = {"minutes": 10.0, "calls": 5, "passed": True, "results": {"1": "a"}}
    record = soak.record_of(None)
    for _ in range(3):
        assert not record.get("passed", False)
        record = soak.joined(record, part, 30.0)
    assert record["passed"]
    assert (record["minutes"], record["calls"], len(record["rows"])) == (30.0, 15, 3)
    assert not soak.joined(record, part | {"results": {"1": "b"}}, 30.0)["passed"]
    assert not soak.joined(record, part | {"passed": False}, 30.0)["passed"]


def test_agreement_keeps_rows_of_the_same_kernels_machine_and_images(rows: ModuleType, tmp_path: Path) -> None:
    agreement = importlib.import_module("engine_agreement")
    file, machine = tmp_path / "agreement.json", {"gpu": "GPU"}
    assert agreement.kept(file, machine, 10) == []
    measured = [{"net": "ResNet-20", "images": 10}, {"net": "ResNet-32", "images": 5}]
    file.write_text(json.dumps({"machine": machine, "sources_digests": agreement.sources_digests(), "rows": measured}))
    assert agreement.kept(file, machine, 10) == measured[:1]
    assert agreement.kept(file, {"gpu": "another"}, 10) == []
    file.write_text(json.dumps({"machine": machine, "sources_digests": {"gemm": "older"}, "rows": measured}))
    assert agreement.kept(file, machine, 10) == []
