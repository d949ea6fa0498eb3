"""What layers left dense for a budget cost in time: which two networks are built, and what is told."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_pruning_prune import digest
from test_pruning_sensitivity import BATCHES, EXAMPLE, LOWER, error, network

from twofour.builder import BuildRecord
from twofour.errors import UnsupportedError
from twofour.exchange import inspect
from twofour.pruning import Budgeted, prune_within, sensitivity
from twofour.report.budget import BudgetTime, time_of_budget


def budgeted() -> tuple[torch.nn.Module, Budgeted]:
    measured = sensitivity(network(), EXAMPLE, error, calibration=BATCHES, **LOWER)
    model = network()
    # The two costliest layers stay dense: what the third alone costs is within its own cost, doubled for batch-norm.
    budget = 2 * measured.ranked[-1].lost
    return model, prune_within(model, EXAMPLE, error, measured, budget, permute=False, calibration=BATCHES)


def test_the_pruned_network_is_timed_beside_one_with_every_layer_pruned(monkeypatch: pytest.MonkeyPatch) -> None:
    model, done = budgeted()
    assert done.kept_dense
    before = digest(model)
    built: list[tuple[int, Any]] = []

    def build(path: Path, **how: Any) -> Any:
        pruned = sum(weight.is_24 for weight in inspect(path).weights)
        built.append((pruned, how))
        about = BuildRecord("m", "H100", 32, "fp16", (), 0, 1).to_json()
        return SimpleNamespace(about={"builds": [about]})

    monkeypatch.setattr("twofour.report.budget.require_gpu", lambda: (9, 0))
    monkeypatch.setattr("twofour.report.budget.build", build)
    found = time_of_budget(model, EXAMPLE, done)
    assert digest(model) == before
    assert [pruned for pruned, _ in built] == [len(done.pruning.pruned), len(done.pruning.pruned) + len(done.kept_dense)]
    (_, first), (_, second) = built
    assert first["timing_cache"] == second["timing_cache"]
    assert (first["device"], first["batch"], first["precision"]) == ("cuda", (32,), "fp16")
    assert found == BudgetTime("H100", 32, "fp16", 0.0, 0.0)
    assert "0.0 %" in str(found)


def test_the_cost_is_told_with_both_times() -> None:
    told = str(BudgetTime("H100", 32, "fp16", 1100.0, 1000.0))
    assert told == "1.100 ms instead of 1.000 ms with none of them dense (+10.0 %; H100, batch 32, fp16, layers timed one by one)"


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(device: int) -> tuple[int, int]:
        raise UnsupportedError("no driver")

    monkeypatch.setattr("twofour.builder.gpu.capability", absent)
    model, done = budgeted()
    with pytest.raises(UnsupportedError, match=r"times every tactic on the GPU, and none can be used here \(no driver\)"):
        time_of_budget(model, EXAMPLE, done)


@pytest.mark.gpu
def test_on_a_gpu_both_networks_are_built() -> None:
    model, done = budgeted()
    found = time_of_budget(model, EXAMPLE, done, batch=8)
    assert found.us > 0
    assert found.all_us > 0
    assert found.batch == 8
