"""Permuting a model: nothing changes, more is kept, everything can be taken back; what cannot be proven is not done and is named."""

import copy
import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from twofour.errors import InputError
from twofour.pattern import select
from twofour.pruning.permutation import LayerOrder, Permutation, carried, permute
from twofour.pruning.permutation.apply import apply_, moved
from twofour.pruning.permutation.capture import Inputs
from twofour.pruning.permutation.proof import Check, difference, prove, redraw, run, tensors_of, widened
from twofour.pruning.permutation.rules import RULES


class Block(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.a, self.na = nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c)
        self.b, self.nb = nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.nb(self.b(F.relu(self.na(self.a(x))))))


class Residual(nn.Module):
    """A residual network of two stages whose second widens by padding channels with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.one, self.two = Block(16), Block(32)
        self.widen = nn.Conv2d(16, 32, 3, 2, padding=1)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(F.relu(self.norm(self.stem(x))))
        x = self.two(F.relu(self.widen(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 8, 8))))
        return self.head(x.mean((2, 3)))


def residual() -> Residual:
    torch.manual_seed(0)
    model = Residual()
    redraw(model)
    return model.eval()


EXAMPLE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def permuted() -> tuple[Residual, Residual, Permutation]:
    model = residual()
    before = copy.deepcopy(model)
    return before, model, permute(model, EXAMPLE, seconds=1.0)


def test_the_function_stays_and_more_is_kept(permuted: tuple[Residual, Residual, Permutation]) -> None:
    before, after, record = permuted
    x = torch.randn(7, 3, 12, 12, dtype=torch.float64)
    with torch.no_grad():
        a, b = before.double()(x), after.double()(x)
    before.float(), after.float()
    assert float((a - b).abs().max()) <= 1e-12 * float(a.abs().max())
    assert record.kept_after > record.kept_before + 0.005
    assert record.permuted_share == 1.0
    for layer in record.layers:
        weight = after.get_parameter(layer.name).detach().numpy()
        kept = np.abs(weight)[select(weight)].sum() / np.abs(weight).sum()
        assert layer.kept_after == pytest.approx(float(kept), rel=1e-5)


def test_first_convolution_and_classifier_do_not_count(permuted: tuple[Residual, Residual, Permutation]) -> None:
    names = {layer.name for layer in permuted[2].layers}
    assert names == {"one.a.weight", "one.b.weight", "two.a.weight", "two.b.weight", "widen.weight"}


def test_the_padded_channels_move_apart_from_the_others(permuted: tuple[Residual, Residual, Permutation]) -> None:
    index = permuted[2].moves["two.a.weight"][1]
    padded = {*range(8), *range(24, 32)}
    assert {int(i) for i in index[sorted(padded)]} == padded
    assert (index[8:24] - 8).tolist() == permuted[2].moves["one.a.weight"][1].tolist()


def test_one_seed_gives_one_result() -> None:
    first, second, other = (permute(residual(), EXAMPLE, seed=s) for s in (4, 4, 5))
    flat = [{n: {a: i.tolist() for a, i in axes.items()} for n, axes in r.moves.items()} for r in (first, second, other)]
    assert flat[0] == flat[1] != flat[2]


def test_checkpoints_map_to_and_from_the_new_order(permuted: tuple[Residual, Residual, Permutation], tmp_path: Path) -> None:
    before, after, record = permuted
    record.save(tmp_path / "order.safetensors")
    loaded = Permutation.load(tmp_path / "order.safetensors")
    assert str(loaded) == str(record)
    assert loaded.layers == record.layers
    assert loaded.checks == record.checks
    new, old = loaded.to_new(before.state_dict()), loaded.to_old(after.state_dict())
    assert all(torch.equal(new[k], v) for k, v in after.state_dict().items())
    assert all(torch.equal(old[k], v) for k, v in before.state_dict().items())
    assert any(not torch.equal(v, after.state_dict()[k]) for k, v in before.state_dict().items())


def test_training_goes_on_as_it_would_have_in_the_old_order() -> None:
    x, y = torch.randn(8, 3, 8, 8, dtype=torch.float64), torch.arange(8)

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
        model.train()
        for _ in range(count):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        model.eval()

    straight = residual().double()
    optimizer = torch.optim.AdamW(straight.parameters(), lr=1e-3)
    steps(straight, optimizer, 3)
    turned = copy.deepcopy(straight)
    state = copy.deepcopy(optimizer.state_dict())
    record = permute(turned, EXAMPLE.double(), seconds=0.5)
    names = [n for n, _ in turned.named_parameters()]
    other = torch.optim.AdamW(turned.parameters(), lr=1e-3)
    other.load_state_dict(record.optimizer_to_new(state, names))
    steps(straight, optimizer, 3)
    steps(turned, other, 3)
    back = record.to_old(turned.state_dict())
    for name, value in straight.state_dict().items():
        torch.testing.assert_close(back[name], value, rtol=1e-6, atol=1e-9)
    again = record.optimizer_to_old(other.state_dict(), names)
    reference = optimizer.state_dict()["state"]
    for index, entry in again["state"].items():
        torch.testing.assert_close(entry["exp_avg"], reference[index]["exp_avg"], rtol=1e-6, atol=1e-9)


def test_the_record_travels_with_the_model_and_composes() -> None:
    model = residual()
    original = copy.deepcopy(model.state_dict())
    first = permute(model, EXAMPLE, seconds=0.3, seed=1)
    assert carried(model) is first
    assert carried(copy.deepcopy(model)) is not None
    model.one.a.weight.data.normal_(generator=torch.Generator().manual_seed(9))
    changed = model.one.a.weight.detach().clone()
    permute(model, EXAMPLE, seconds=0.3, seed=2)
    both = carried(model)
    assert both is not None
    back = both.to_old(model.state_dict())
    assert all(torch.equal(back[k], v) for k, v in original.items() if k != "one.a.weight")
    assert torch.equal(back["one.a.weight"], first.to_old({"one.a.weight": changed})["one.a.weight"])


def test_an_interrupted_search_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("twofour.pruning.permutation.permute")
    whole = permute(residual(), EXAMPLE, seed=3)
    search, calls = module.search, []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return search(*args, **kwargs)

    monkeypatch.setattr(module, "search", interrupted)
    model = residual()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyboardInterrupt):
        permute(model, EXAMPLE, seed=3, resume=tmp_path / "searches")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    calls[:] = [1] * 10
    resumed = permute(model, EXAMPLE, seed=3, resume=tmp_path / "searches")
    assert len(calls) < 10 + 5
    assert {n: {a: i.tolist() for a, i in x.items()} for n, x in resumed.moves.items()} == {
        n: {a: i.tolist() for a, i in x.items()} for n, x in whole.moves.items()
    }


def test_progress_is_told_up_to_one() -> None:
    told: list[tuple[str, float]] = []
    permute(residual(), EXAMPLE, seconds=0.3, progress=lambda name, share: told.append((name, share)))
    assert [s for _, s in told] == sorted(s for _, s in told)
    assert told[-1][1] == pytest.approx(1.0)
    assert {name.split(" ")[0] for name, _ in told} <= {layer for layer, _ in residual().named_parameters()}


def test_tied_weights_move_together() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.mix, self.out = nn.Embedding(11, 16), nn.Linear(16, 16), nn.Linear(16, 11, bias=False)
            self.out.weight = self.table.weight

        def forward(self, ids: Tensor) -> Tensor:
            x = self.table(ids)
            return self.out(x + torch.relu(self.mix(x)))

    torch.manual_seed(0)
    model = Tied().eval()
    ids = torch.arange(10).view(2, 5)
    before = model(ids)
    record = permute(model, ids, seconds=0.3)
    assert model.out.weight is model.table.weight
    assert record.names["out.weight"] == record.names["table.weight"] == "table.weight"
    assert record.moves["table.weight"].keys() == {1}
    torch.testing.assert_close(model(ids), before, rtol=1e-5, atol=1e-6)
    state = record.to_old(model.state_dict())
    assert torch.equal(state["out.weight"], state["table.weight"])


class Stopped(nn.Module):
    def __init__(self, between: Any) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1), nn.Linear(16, 4)
        self.between = between

    def forward(self, x: Tensor) -> Any:
        x = torch.relu(self.b(self.a(x)))
        return self.between(self, x)


def test_an_unknown_operation_stops_and_is_named() -> None:
    model = Stopped(lambda s, x: s.head(s.c(torch.cumsum(x, 1)).mean((2, 3))))
    record = permute(model, EXAMPLE, seconds=0.3)
    reasons = {layer.name: layer.reason for layer in record.layers}
    assert reasons["b.weight"] == ""
    assert "aten.cumsum" in reasons["c.weight"]
    assert not any("c.weight" in name and 1 in axes for name, axes in record.moves.items())


def test_an_output_keeps_its_order() -> None:
    model = Stopped(lambda s, x: (s.head(s.c(x).mean((2, 3))), x))
    record = permute(model, EXAMPLE, seconds=0.3)
    reasons = {layer.name: layer.reason for layer in record.layers}
    assert "an output of the model" in reasons["c.weight"]
    assert reasons["b.weight"] == ""


def test_a_training_branch_that_evaluation_lacks_stops_too() -> None:
    def between(s: Any, x: Tensor) -> Tensor:
        return s.head(s.c(torch.cumsum(x, 1) if s.training else x).mean((2, 3)))

    record = permute(Stopped(between), EXAMPLE, seconds=0.3)
    reasons = {layer.name: layer.reason for layer in record.layers}
    assert "aten.cumsum" in reasons["c.weight"]
    assert "in train" in reasons["c.weight"]


def test_a_model_that_cannot_be_captured_is_left_as_it_is() -> None:
    def between(s: Any, x: Tensor) -> Tensor:
        return s.head(x.mean((2, 3))) if float(x.sum()) > 0 else s.head(s.c(x).mean((2, 3)))

    model = Stopped(between)
    before = copy.deepcopy(model.state_dict())
    record = permute(model, EXAMPLE, seconds=0.3)
    assert record.reason.startswith("evaluation cannot be captured: ")
    assert str(record).startswith("Permutation: none, evaluation cannot be captured")
    assert not record.moves
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_flags_and_caches_are_put_back() -> None:
    model = residual()
    model.two.eval()
    model.one.train()
    flags = [m.training for m in model.modules()]
    permute(model, EXAMPLE, seconds=0.2)
    assert [m.training for m in model.modules()] == flags


def test_a_wrong_rule_is_caught_undone_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    # A cumulative sum over channels that claims to pass them through.
    monkeypatch.setitem(RULES, "aten.cumsum", RULES["aten.relu"])
    model = Stopped(lambda s, x: s.head(s.c(torch.cumsum(x, 1)).mean((2, 3))))
    before = copy.deepcopy(model)
    record = permute(model, EXAMPLE, seconds=0.3)
    assert any("the proof failed" in note and "cumsum" in note for note in record.notes), record.notes
    x = torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(model(x), before(x), rtol=1e-5, atol=1e-6)
    # The channels before the sum go back; those between the first two convolutions stay permuted.
    assert 1 in record.moves["b.weight"]
    assert "c.weight" not in record.moves or 1 not in record.moves["c.weight"]
    assert all(c.passed for c in record.checks)


def test_redrawing_shows_what_a_fresh_network_hides() -> None:
    torch.manual_seed(0)
    model = Residual().eval()
    with torch.no_grad():
        model.two.nb.weight.zero_()
    # A wrong order inside the branch that the zero scale hides, and of equal running statistics.
    wrong = {"two.a.weight": {0: np.roll(np.arange(32), 1)}}
    checks = prove(model, Inputs.of(EXAMPLE), wrong)
    fresh = [c.error for c in checks if c.network == "as it is"]
    drawn = [c.error for c in checks if c.network == "redrawn"]
    assert max(fresh) == 0.0
    assert min(drawn) > 1e-3
    statistics = prove(model, Inputs.of(EXAMPLE), {"one.na.running_var": {0: np.roll(np.arange(16), 1)}})
    assert max(c.error for c in statistics if c.network == "as it is") == 0.0
    assert max(c.error for c in statistics if c.network == "redrawn") > 1e-3


def test_two_batch_sizes_both_networks_and_training_are_checked(permuted: tuple[Residual, Residual, Permutation]) -> None:
    seen = {(c.network, c.mode, c.batch) for c in permuted[2].checks}
    assert seen == {
        *(("as it is", "eval", 2), ("as it is", "eval", 3), ("redrawn", "eval", 2), ("redrawn", "eval", 3)),
        ("redrawn", "train", 2),
    }
    assert {c.limit for c in permuted[2].checks} == {1e-9}


def test_a_model_that_casts_to_float32_is_still_judged_in_float64() -> None:
    class Casting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            scale = y.to(torch.float32).pow(2).mean(-1, keepdim=True) + torch.ones(1, dtype=torch.float32)
            return self.head(F.softmax(self.b(y / scale.to(y.dtype)), -1, dtype=torch.float32).to(y.dtype))

    record = permute(Casting(), torch.randn(4, 12), seconds=0.2)
    assert record.moves
    assert record.largest_error < 1e-13


def test_inputs_may_be_a_tensor_a_tuple_or_keywords() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor, shift: Tensor) -> dict[str, Tensor]:
            return {"y": self.head(torch.relu(self.b(self.a(x) + shift.mean())))}

    for example in ((torch.randn(2, 8), torch.randn(2, 4)), {"x": torch.randn(2, 8), "shift": torch.randn(2, 4)}):
        torch.manual_seed(0)
        assert permute(Two(), example, seconds=0.2).permuted_share > 0.6
    with pytest.raises(InputError, match="example_inputs is a int, expected a tensor"):
        permute(Two(), 5)
    with pytest.raises(InputError, match="no tensor with a batch axis"):
        permute(Two(), (torch.tensor(1.0),))


def test_targets_that_are_no_parameters_are_an_error() -> None:
    with pytest.raises(InputError, match="targets name 'nowhere'"):
        permute(residual(), EXAMPLE, targets={"nowhere": 1})


def test_messages_of_the_record(tmp_path: Path, permuted: tuple[Residual, Residual, Permutation]) -> None:
    record = permuted[2]
    with pytest.raises(InputError, match=r"one.a.weight has shape \[2, 2\], expected 16 elements along axis 0"):
        record.to_new({"one.a.weight": torch.zeros(2, 2)})
    state = {"state": {0: {"row": torch.zeros(3)}}, "param_groups": [{"params": [0]}]}
    with pytest.raises(InputError, match=r"optimizer state 'row' of one.a.weight has shape \[3\]"):
        record.optimizer_to_new(state, ["one.a.weight"])
    with pytest.raises(InputError, match="parameters has 2 names, expected 1"):
        record.optimizer_to_new(state, ["a", "b"])
    (tmp_path / "broken").write_bytes(b"nonsense")
    with pytest.raises(InputError, match="is not a permutation file"):
        Permutation.load(tmp_path / "broken")
    from safetensors.numpy import save_file

    save_file({"x": np.zeros(1)}, str(tmp_path / "other"))
    with pytest.raises(InputError, match="expected 'twofour-permutation-1'"):
        Permutation.load(tmp_path / "other")
    with pytest.raises(InputError, match=r"resume file .* cannot be read"):
        permute(residual(), EXAMPLE, seconds=0.1, resume=tmp_path / "broken")


def test_difference_sees_shapes_nan_and_integers() -> None:
    one = torch.ones(3, dtype=torch.float64)
    assert difference([one], [one * (1 + 1e-6)]) == pytest.approx(1e-6)
    assert difference([one], [torch.ones(4)]) == float("inf")
    assert difference([one], [one * float("nan")]) == float("inf")
    assert difference([one * float("inf")], [one * float("inf")]) == 0.0
    assert difference([torch.tensor([1, 2])], [torch.tensor([2, 1])]) == float("inf")
    assert difference([one], []) == float("inf")


def test_moving_back_undoes_moving() -> None:
    x = torch.arange(24).view(4, 6)
    axes = {0: np.array([2, 0, 3, 1]), 1: np.array([5, 4, 0, 1, 3, 2])}
    assert torch.equal(moved(moved(x, axes), axes, back=True), x)
    assert torch.equal(moved(x, axes)[1], x[0][torch.tensor([5, 4, 0, 1, 3, 2])])


def test_apply_and_run_agree_with_eager() -> None:
    model = residual()
    twin = widened(model)
    apply_(tensors_of(twin), {"stem.weight": {0: np.arange(16)}})
    (result,) = run(twin, Inputs.of(EXAMPLE.double()))
    torch.testing.assert_close(result, model.double()(EXAMPLE.double()), rtol=1e-12, atol=1e-12)


def test_a_record_says_one_line() -> None:
    layer = LayerOrder("w", 1, 100, 1.0, 1.0, 0.75, 0.8)
    record = Permutation(layers=[layer], checks=[Check("redrawn", "eval", 2, 2e-15, 1e-9, "float64")])
    assert str(record) == (
        "Permutation: 1 of 1 weights reordered, kept magnitude 75.00 % -> 80.00 %, proven in float64 (largest error 2.0e-15)"
    )


def test_float32_is_judged_by_a_derived_limit_and_still_sees_errors(permuted: tuple[Residual, Residual, Permutation]) -> None:
    before, _, record = permuted
    checks = prove(before, Inputs.of(EXAMPLE), record.moves, operations=30, wide=False)
    assert {c.dtype for c in checks} == {"float32"}
    assert all(c.passed for c in checks)
    assert max(c.limit for c in checks) < 1e-3
    wrong = {**record.moves, "one.b.weight": {1: np.roll(np.arange(16), 1)}}
    assert not all(c.passed for c in prove(before, Inputs.of(EXAMPLE), wrong, operations=30, wide=False))
