"""Accuracy evidence: the statistics of the page, the pages are those of the results, and rows survive shards and interruptions."""

import itertools
import json
import math
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from safetensors.torch import save_file
from scipy import stats
from script_loader import load_script
from torch import Tensor, nn

from twofour.errors import VerificationError

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("evidence")


@pytest.fixture(scope="module", autouse=True)
def _evidence_on_the_path() -> None:
    sys.path.insert(0, str(ROOT / "evidence"))


def test_the_interval_is_student_s_t(script: ModuleType) -> None:
    one, other = (91.5, 91.9, 92.1, 91.6), (91.6, 91.9, 92.0, 91.8)
    found = script.Paired(tuple(a - b for a, b in zip(one, other, strict=True)))
    # By hand: differences −0.1, 0, 0.1, −0.2; mean −0.05; s = √(0.05/3); t(0.975, 3) = 3.18245.
    assert found.mean == pytest.approx(-0.05)
    assert found.half == pytest.approx(3.18245 * math.sqrt(0.05 / 3) / 2, rel=1e-5)
    low, high = stats.ttest_rel(one, other).confidence_interval(0.95)
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high))
    assert str(found) == "−0.05 ± 0.21"


def test_a_goal_is_reached_by_the_upper_end_of_a_narrow_interval(script: ModuleType) -> None:
    goal = script.Goal("n", "d", floor=-0.5, aim=-0.1, published=91.0, seeds=3)
    near = lambda mean: script.Paired(tuple(mean + d for d in (-0.05, 0.0, 0.05)))  # noqa: E731 - half-width 0.124
    assert near(0).half == pytest.approx(0.1242, abs=1e-4)

    def reached(value: float, dense: float = 91.0) -> list[dict[str, Any]]:
        return [{"variant": "2:4", "seed": 0, "value": value}, {"variant": "dense", "seed": None, "value": dense}]

    outcomes = [script.outcome(goal, near(mean), reached(at)) for mean, at in ((-0.63, 92), (-0.61, 92), (-0.21, 91), (-0.21, 90.9))]
    assert outcomes == ["missed", "reached", "reached, and the aim", "reached"]
    assert "wider" in script.outcome(goal, script.Paired((-0.5, 0.5, 0.0)), reached(92))
    assert script.outcome(goal, script.Paired((0.0, 0.0)), reached(92)) == "open: 2 of 3 seeds"
    (own,) = (g for g in script.GOALS if g.net == "ResNet-18")
    assert script.outcome(own, near(0), reached(95, 94.9)) == "open: the dense network is below 95"
    assert script.outcome(own, near(0), reached(95, 95.0)) == "reached, and the aim"


@pytest.mark.parametrize("name", ["docs/evidence.md", "docs/recipes.md", "README.md"])
def test_the_pages_are_those_of_the_results(script: ModuleType, name: str) -> None:
    page = (ROOT / name).read_text(encoding="utf-8")
    assert script.filled(page, script.TABLES[name]) == page, "run: python scripts/evidence.py"


@pytest.fixture
def recorded(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a GPU's results in a project that holds nothing else."""
    monkeypatch.setattr(script, "ROOT", tmp_path)
    made = tmp_path / "results" / "gpu"
    made.mkdir(parents=True)
    return made


def made_up(experiment: str, data: str, *, lr: float = 0.2, day: str = "2026-01-02", better: float = 0.0) -> dict[str, Any]:
    recipe = {"epochs": 40, "batch": 512, "lr": lr, "distill": 0.0}
    head = {"experiment": experiment, "net": "ResNet-20", "data": data, "metric": "accuracy"}
    rows = [{**head, "variant": "dense", "seed": None, "recipe": None, "value": 91.73}]
    rows += [{**head, "variant": "2:4 one-shot, magnitude", "seed": None, "recipe": None, "value": 71.2}]
    for seed, (control, sparse, wanda) in enumerate([(91.8, 91.6, 91.5), (91.9, 91.8, 91.9)]):
        for variant, value in (("dense + same training", control), ("2:4", sparse), ("2:4, wanda", wanda)):
            measured = {"value": value + better, "gpu_seconds": 30.0, "date": f"{day}T00:00:00"}
            rows.append({**head, "variant": variant, "seed": seed, "recipe": recipe, **measured})
    return {"machine": {"gpu": "H200"}, "date": "2026-01-02T00:00:00", "command": "python x", "rows": rows}


def test_the_tables_and_the_plot_hold_what_was_measured(script: ModuleType, recorded: Path, tmp_path: Path) -> None:
    (recorded / "accuracy-a.json").write_text(json.dumps(made_up("retraining", "CIFAR-10 test")))
    (recorded / "accuracy-b.json").write_text(json.dumps(made_up("ablations", "CIFAR-10 held-out training images")))
    summary = script.summary_table()
    row = (
        "| ResNet-20 (40 epochs, batch 512, lr 0.2) | CIFAR-10 test | 91.73 | 71.20 | 91.85 ± 0.07 | 91.70 ± 0.14 | **−0.15 ± 0.64** | 2 |"
    )
    assert row in summary
    short = script.short_table()
    assert "| ResNet-20, CIFAR-10 test | 91.73 | 91.85 ± 0.07 | 91.70 ± 0.14 | **−0.15 ± 0.64** | open: 2 of 10 seeds |" in short
    assert "| ResNet-56, CIFAR-10 test | – | – | – | – | not measured yet |" in short
    assert len(short.splitlines()) == 6
    assert "Not measured yet: ResNet-20, 200 epochs (CIFAR-10 test); ResNet-32" in summary
    assert "| 2:4, wanda | 40 epochs, batch 512, lr 0.2 | – | 91.70 ± 0.28 | −0.15 ± 1.91 | +0.00 ± 1.27 | 2 |" in script.choices_table(
        "ablations"
    )
    assert script.choices_table("retraining") == "Not measured yet."
    assert "| H200 | 3.0 | 6 | 2026-01-02 | `python x` |" in script.runs_table()
    script.draw(tmp_path / "plot.svg")
    assert "ResNet-20, CIFAR-10 test" in (tmp_path / "plot.svg").read_text()


def test_of_two_recipes_the_one_measured_last_is_shown_not_the_better_on_the_test_set(script: ModuleType, recorded: Path) -> None:
    first, second = (
        made_up("retraining", "CIFAR-10 test", lr=0.2, better=1.0),
        made_up("retraining", "CIFAR-10 test", lr=0.06, day="2026-01-03"),
    )
    (recorded / "accuracy-a.json").write_text(json.dumps({**first, "rows": [*first["rows"], *second["rows"][2:]]}))
    assert "| ResNet-20, CIFAR-10 test | 91.73 | 91.85 ± 0.07 | 91.70 ± 0.14 |" in script.short_table()
    assert script.plot_names(script.measured(script.recorded())) == [
        "ResNet-20, CIFAR-10 test, lr 0.2, 2 of 10 seeds",
        "ResNet-20, CIFAR-10 test, lr 0.06, 2 of 10 seeds",
    ]
    assert {"lr 0.2)", "lr 0.06)"} == {
        line.split("512, ")[1].split(" |")[0] for line in script.summary_table().splitlines() if "512, " in line
    }


def test_a_recipe_names_where_it_starts_and_what_pruning_alone_leaves(script: ModuleType, recorded: Path) -> None:
    value = made_up("retraining", "CIFAR-10 test")
    for row in value["rows"]:
        if row["recipe"]:
            row["recipe"] = row["recipe"] | {"method": "alps", "epochs": 20}
    value["rows"].append({**value["rows"][1], "variant": "2:4 one-shot, alps", "value": 91.34})
    (recorded / "accuracy-a.json").write_text(json.dumps(value))
    assert (
        "| ResNet-20 (20 epochs, batch 512, lr 0.2, from alps) | CIFAR-10 test | 91.73 | 71.20 (magnitude), 91.34 (alps) |"
    ) in script.summary_table()
    stsb = {"steps": 600, "batch": 32, "lr": 1e-4, "distill": 1.0, "labels": 1.0, "unseen": True}
    assert script.recipe_text(stsb) == "600 steps, batch 32, lr 0.0001, distillation 1, labels 1, no sentence of dev or test"
    texts = [script.recipe_text(row["recipe"], v) for v in ("2:4", "2:4, permuted", "2:4, wanda", "2:4, masks recomputed", script.CONTROL)]
    assert [text.split("lr 0.2")[1] for text in texts] == [", from alps", ", from alps", "", "", ""]
    assert script.oneshot_of("2:4, permuted", "alps") == "2:4 one-shot, alps, permuted"
    assert script.oneshot_of("2:4, wanda", "alps") == "2:4 one-shot, wanda"


def test_shards_write_their_own_files_and_their_union_loses_nothing(tmp_path: Path) -> None:
    import ledger

    out = tmp_path / "accuracy.json"
    row = {"experiment": "e", "net": "n", "data": "d", "variant": "2:4", "recipe": {"lr": 1}}
    shards = [ledger.Record(out, "command", (i, 2)) for i in range(2)]
    for i, shard in enumerate(shards):
        shard.add({**row, "seed": i, "value": 1.0 + i})
        shard.add({**row, "seed": None, "value": 9.0})
    assert not out.exists()
    # A process that starts anew finds what it had finished.
    assert ledger.Record(out, "command", (0, 2)).has({**row, "seed": 0})
    ledger.merge(out, [ledger.part(out, i, 2) for i in range(2)])
    assert sorted(tmp_path.iterdir()) == [out]
    assert [(r["seed"], r["value"]) for r in ledger.rows_of(out)] == [(0, 1.0), (None, 9.0), (1, 2.0)]
    again = ledger.Record(out, "command")
    again.add({**row, "seed": 1, "value": 5.0}, {**row, "seed": 2, "value": 3.0})
    assert [r["value"] for r in ledger.rows_of(out)] == [1.0, 9.0, 2.0, 3.0]


def test_two_processes_on_one_file_lose_no_row_and_each_keeps_its_command(script: ModuleType, recorded: Path) -> None:
    import ledger

    out = recorded / "accuracy.json"
    row = {"experiment": "e", "net": "n", "data": "d", "variant": "2:4", "recipe": {"lr": 1}, "gpu_seconds": 60.0}
    # As files were written before rows named their command.
    ledger.write(out, [{**row, "seed": 9, "value": 0.0}], "python the first")
    one, other = ledger.Record(out, "python one"), ledger.Record(out, "python other")
    one.add({**row, "seed": 0, "value": 1.0})
    other.add({**row, "seed": 1, "value": 2.0})
    one.add({**row, "seed": 2, "value": 3.0})
    assert [(r["seed"], r["command"]) for r in ledger.rows_of(out)] == [
        (9, "python the first"),
        (0, "python one"),
        (1, "python other"),
        (2, "python one"),
    ]
    minutes = [tuple(line.split(" | ")[i] for i in (2, 3, 5)) for line in script.runs_table().splitlines()[2:]]
    assert minutes == [("1.0", "1", "`python the first` |"), ("2.0", "2", "`python one` |"), ("1.0", "1", "`python other` |")]


def test_what_several_processes_left_is_found_by_one(tmp_path: Path) -> None:
    import argparse

    import ledger

    out = tmp_path / "accuracy.json"
    row = {"experiment": "e", "net": "n", "data": "d", "variant": "2:4", "recipe": {"lr": 1}, "seed": 1, "value": 1.0}
    ledger.Record(out, "command", (1, 2)).add(row)
    alone = argparse.Namespace(out=out, gpus=1, per_gpu=1, shard=(0, 1))
    assert not ledger.shared_over_gpus(alone)
    assert ledger.Record(out, "command").has(row)
    assert list(tmp_path.iterdir()) == [out]


def test_of_several_processes_one_measures_the_kernels_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import run_all

    choices, begun = tmp_path / "kept" / "narrow.json", []

    def measure(command: list[str], **_: Any) -> None:
        begun.append(command)
        time.sleep(0.2)
        choices.write_text("{}")

    monkeypatch.setattr(run_all.subprocess, "run", measure)
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda _: run_all.choose_kernels(choices, {}), range(3)))
    assert len(begun) == 1


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, 4, 1), nn.Conv2d(8, 8, 3, 2, 1)
        self.norm, self.linear = nn.BatchNorm2d(8), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.relu(self.norm(self.conv2(torch.relu(self.conv1(x))))).mean((2, 3)))  # type: ignore[no-any-return]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of data as the experiments read it: one sheet to train on and one to test."""
    where = tmp_path / "data" / "cifar10"
    where.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split in ("tr", "te"):
        pixels = rng.integers(0, 256, (50, 1, 50, 1, 3), dtype=np.uint8)
        sheet = np.broadcast_to(pixels, (50, 32, 50, 32, 3)).reshape(1600, 1600, 3)
        Image.fromarray(sheet).save(where / f"{split}_00.webp", lossless=True, quality=0, method=0)
        np.save(where / f"labels_{split}.npy", rng.integers(0, 10, 2500, dtype=np.uint8))
    return where.parent


def judged_but_trained(judge: Callable[..., float]) -> Callable[..., float]:
    """Return `judge`, stopped as if killed at the second network that was trained."""
    count = itertools.count()

    def judged(self: Any, model: nn.Module, plain: Tensor) -> float:
        # The dense network, the one-shot and a trained one.
        if next(count) == 3:
            raise KeyboardInterrupt
        return judge(self, model, plain)

    return judged


def test_an_experiment_runs_on_a_cpu_and_goes_on_where_it_stopped(
    script: ModuleType, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import accuracy_cifar
    import arms
    import fleet
    import ledger
    import networks

    recipe = fleet.Recipe(epochs=1, batch=32)
    monkeypatch.setitem(networks.NETWORKS, "Tiny", networks.Network(Tiny, (), recipe, ()))
    out = tmp_path / "results" / "cpu" / "accuracy-tiny.json"
    words = [
        "accuracy_cifar.py",
        str(folder),
        str(out),
        "--nets",
        "Tiny",
        "--images",
        "64",
        "--epochs",
        "2",
        "--batch",
        "32",
        "--seeds",
        "2",
    ]
    monkeypatch.setattr(sys, "argv", [*words, "--kept", str(tmp_path / "kept"), "--minutes", "0"])
    with pytest.raises(SystemExit, match="Tiny: time was up before training began; run the same command again to go on"):
        accuracy_cifar.main()
    data = arms.Data.of(folder, torch.device("cpu"), held_out=False, num_images=64)
    program = fleet.Program(Tiny(), compiled=False)
    with (
        FileLock(tmp_path / "kept" / "Tiny-64-images-1-epochs.lock"),
        pytest.raises(fleet.OutOfTimeError, match="while another process trains the dense network"),
    ):
        networks.dense_network("Tiny", data.train, folder, tmp_path / "kept", program, published=True, until=0.0)
    networks.dense_network("Tiny", data.train, folder, tmp_path / "kept", program, published=True)
    with pytest.raises(SystemExit, match="Tiny: time was up before training began; run the same command again to go on"):
        accuracy_cifar.main()
    monkeypatch.setattr(sys, "argv", [*words, "--kept", str(tmp_path / "kept")])
    with monkeypatch.context() as killed:
        # Killed between the last step and the file of results.
        killed.setattr(arms.Experiment, "judge", judged_but_trained(arms.Experiment.judge))
        with pytest.raises(KeyboardInterrupt):
            accuracy_cifar.main()
    with monkeypatch.context() as trained:
        trained.setattr(fleet.Fleet, "run_epoch", None)  # Nothing is left to train, only to judge.
        accuracy_cifar.main()
    rows = ledger.rows_of(out)
    assert [(row["variant"], row["seed"]) for row in rows] == [
        ("dense", None),
        ("2:4 one-shot, magnitude", None),
        ("dense + same training", 0),
        ("2:4", 0),
        ("dense + same training", 1),
        ("2:4", 1),
    ]
    assert not list((tmp_path / "kept").glob("*.pt"))
    assert all(0 <= row["value"] <= 100 and row["date"] for row in rows)
    # Of a trial, so that the whole is not taken for done.
    assert {row["data"] for row in rows} == {"CIFAR-10 test, first 128, of a trial"}
    # Of conv1 the three input channels make no group; conv2 is 8×8×3×3.
    assert [row.get("groups_24") for row in rows] == [None, 144, None, 144, None, 144]
    dense = tmp_path / "kept" / "Tiny-64-images-1-epochs.safetensors"
    dense.unlink()
    with monkeypatch.context() as done:
        done.setattr(fleet, "Fleet", None)  # Nothing is left to train, so on a machine without the dense network it is not trained either.
        accuracy_cifar.main()
    assert ledger.rows_of(out) == rows
    torch.manual_seed(1)
    save_file(Tiny().state_dict(), dense)
    monkeypatch.setattr(sys, "argv", [*words, "--seeds", "3", "--kept", str(tmp_path / "kept")])
    with pytest.raises(SystemExit, match=r"Tiny: the dense network is another than that of the rows in .*accuracy-tiny.json, expected"):
        accuracy_cifar.main()
    monkeypatch.setattr(script, "ROOT", tmp_path)
    assert "4 |" in script.runs_table()


def test_the_arms_of_a_recipe_start_where_it_says(script: ModuleType) -> None:
    import ablations
    import accuracy_cifar
    import fleet

    recipe = fleet.Recipe(method="ria")
    told = [(arm.variant, arm.method, arm.permuted) for arm in accuracy_cifar.arms_of(recipe, ["off", "on"], search=True)]
    assert told == [
        ("dense + same training", "", False),
        ("2:4", "ria", False),
        ("2:4, permuted", "ria", True),
        ("2:4, alps", "alps", False),
    ]
    assert len(accuracy_cifar.arms_of(recipe, ["off"], search=False)) == 2
    chosen = ablations.arms(recipe)
    assert [arm.method for arm in chosen["method"]] == ["magnitude", "wanda", "sparsegpt", "alps"]
    assert {arm.method for name in ("default", "permutation", "batch-norm", "length") for arm in chosen[name]} == {"", "ria"}


def test_the_best_recipe_is_that_of_the_held_out_images(tmp_path: Path) -> None:
    import accuracy_cifar
    import fleet
    import ledger

    base, found = fleet.Recipe(epochs=7), tmp_path / "recipe.json"
    with pytest.raises(SystemExit, match=r"recipe.json holds no 2:4 row judged on held-out images"):
        accuracy_cifar.best_of(found, base)
    rows = []
    held_out, test = "CIFAR-10 held-out training images", "CIFAR-10 test"
    for lr, variant, data, values in (
        (0.1, "2:4", held_out, (90.0, 91.0)),
        (0.2, "2:4, alps", held_out, (90.9, 90.5)),
        (0.3, "2:4", held_out, (91.0, 90.0)),
        (0.4, "2:4", test, (99.0, 99.0)),
        (0.2, accuracy_cifar.CONTROL, held_out, (90.6, 90.8)),
        (0.5, accuracy_cifar.CONTROL, held_out, (99.0, 99.0)),
        # The dense network falls under it, so it is no comparison.
        (0.6, "2:4", held_out, (91.0, 91.2)),
        (0.6, accuracy_cifar.CONTROL, held_out, (82.0, 81.8)),
    ):
        recipe = {"lr": lr, "distill": lr / 2, "method": "magnitude"}
        rows += [{"variant": variant, "data": data, "seed": s, "recipe": recipe, "value": v} for s, v in enumerate(values)]
    rows.append({"variant": "dense", "data": held_out, "seed": None, "recipe": None, "value": 99.0})
    ledger.write(found, rows, "command")
    assert accuracy_cifar.best_of(found, base) == fleet.Recipe(epochs=7, lr=0.2, distill=0.1, method="alps")


def test_a_pruned_start_is_calculated_once_and_read_as_it_was(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import arms
    import fleet

    data = arms.Data.of(folder, torch.device("cpu"), held_out=False, num_images=64)
    torch.manual_seed(0)
    model, arm = Tiny(), arms.Arm("2:4", fleet.Recipe(), "wanda")
    expected, record = arms.pruned(model, arm, data.train)
    first = arms.pruned_once(model, arm, data.train, tmp_path)
    monkeypatch.setattr(arms, "pruned", None)
    for found, again in (first, arms.pruned_once(model, arm, data.train, tmp_path)):
        assert str(again) == str(record)
        assert again.masks.keys() == record.masks.keys()
        assert all(torch.equal(again.masks[name], mask) for name, mask in record.masks.items())
        assert all(torch.equal(value, expected.state_dict()[name]) for name, value in found.state_dict().items())
    with pytest.raises(TypeError):  # another network's start is another
        arms.pruned_once(Tiny(), arm, data.train, tmp_path)


def test_a_network_that_is_not_two_of_four_is_not_recorded() -> None:
    import ledger

    model = nn.Sequential(nn.Linear(8, 2), nn.Linear(4, 4))
    for p in model.parameters():
        p.data.fill_(1.0)
    model[0].weight.data[:, ::2] = 0
    assert ledger.pattern_of(model, ["0.weight"]) == {"pattern": "2:4", "layers_24": 1, "groups_24": 4}
    model[0].weight.data[1, 0] = 1
    with pytest.raises(VerificationError, match=r"'0.weight' has 3 of 4 groups 2:4 after training, expected all"):
        ledger.pattern_of(model, ["0.weight"])


def test_masks_that_are_recomputed_stay_two_of_four_and_move(folder: Path) -> None:
    import arms
    import fleet

    data = arms.Data.of(folder, torch.device("cpu"), held_out=False, num_images=128)
    torch.manual_seed(0)
    model, recipe = Tiny(), fleet.Recipe(epochs=2, batch=8, lr=0.5)
    arm = arms.Arm("2:4, masks recomputed", recipe, recomputed=True)
    _, pruning = arms.pruned(model, arm, data.train)
    member = fleet.Member(model, fleet.Program(model, compiled=False), data.train, recipe, seed=0, pruning=pruning, recomputed=True)
    first = {name: mask.clone() for name, mask in member.scratch.masks.items()}
    fleet.train_together([member], say=lambda line: None)
    weights = dict(member.model.named_parameters())
    for name, mask in first.items():
        kept = (weights[name] != 0).reshape(8, 2, 4, -1).sum(2)
        assert int(kept.max()) == 2
        assert not torch.equal(member.scratch.masks[name], mask)
