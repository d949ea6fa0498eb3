"""Networks made to be corrupted: what shares memory, changes itself, trains otherwise or cannot be run again is left alone, by name."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from twofour.errors import InputError
from twofour.pruning.permutation import Permutation, permute
from twofour.pruning.permutation.capture import Inputs
from twofour.pruning.permutation.proof import prove, redraw
from twofour.pruning.permutation.record import undo
from twofour.pruning.permutation.rules import RULES

EXAMPLE = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Three convolutions; `end` computes the result from what the second one gives."""

    def __init__(self, end: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.head = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1), nn.Linear(16, 4)
        self.end = end
        for name, part in parts.items():
            if isinstance(part, Tensor):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self.end(self, torch.relu(self.b(self.a(x))))

    def last(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.c(x).mean((2, 3)))
        return result


def unchanged(before: nn.Module, after: nn.Module, *, train: bool = False) -> None:
    x = torch.randn(5, 3, 6, 6)
    with torch.no_grad():
        a, b = (copy.deepcopy(m).double().train(train)(x.double()) for m in (before, after))
    torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9)


def permuted(model: Net, **options: Any) -> tuple[Net, Permutation]:
    model.eval()
    before = copy.deepcopy(model)
    return before, permute(model, EXAMPLE, seconds=0.1, **options)


def test_memory_that_a_plain_attribute_shares_stays() -> None:
    def end(s: Any, x: Tensor) -> Tensor:
        return s.last(x) + (s.seen[0] * torch.arange(16)).sum()

    model = Net(end)
    model.__dict__["seen"] = [model.b.bias.detach()]
    x = torch.randn(5, 3, 6, 6)
    before = model.eval()(x)
    record = permute(model, EXAMPLE, seconds=0.1)
    # A deep copy keeps the sharing, so the model itself is compared.
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
    reasons = {layer.name: layer.reason for layer in record.layers}
    assert reasons["c.weight"] == "memory shared with a tensor that is no parameter or buffer"
    assert "b.weight" in record.moves
    assert 0 not in record.moves["b.weight"]


def test_a_parameter_that_is_also_read_through_a_list_stays() -> None:
    model = Net(lambda s, x: s.last(x) + F.conv2d(x, s.many[0]).cumsum(1).mean())
    model.__dict__["many"] = [model.c.weight]
    x = torch.randn(5, 3, 6, 6)
    before = model.eval()(x)
    record = permute(model, EXAMPLE, seconds=0.1)
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
    assert "c.weight" not in record.moves


def test_a_weight_seen_by_a_convolution_and_a_linear_moves_for_both() -> None:
    def end(s: Any, x: Tensor) -> Tensor:
        return s.last(F.linear(x.permute(0, 2, 3, 1), s.c.weight.view(16, 16)).permute(0, 3, 1, 2))

    model = Net(end)
    before, record = permuted(model)
    unchanged(before, model)
    assert record.moves["c.weight"][0].tolist() == record.moves["c.weight"][1].tolist()


def test_a_buffer_used_as_an_index_stops_what_it_picks() -> None:
    model = Net(lambda s, x: s.last(x[:, s.order]), order=torch.arange(15, -1, -1))
    before, record = permuted(model)
    unchanged(before, model)
    assert {layer.name: "aten.index" in layer.reason for layer in record.layers} == {"b.weight": False, "c.weight": True}


def moving_average(s: Any, x: Tensor) -> Tensor:
    s.average.mul_(0.9).add_(0.1 * x.mean((0, 2, 3)).detach())
    result: Tensor = s.last(x - s.average[:, None, None])
    return result


def test_a_model_that_changes_its_own_buffers_in_evaluation_is_permuted_and_keeps_them() -> None:
    model = Net(moving_average, average=torch.randn(16))
    before, record = permuted(model)
    assert not record.notes
    assert {layer.name for layer in record.layers if layer.moved_share} == {"b.weight", "c.weight"}
    assert torch.equal(record.to_old(model.state_dict())["average"], before.average)
    assert "average" in record.moves
    x = torch.randn(4, 3, 6, 6)
    for step in range(3):
        torch.testing.assert_close(model(x), before(x), rtol=1e-5, atol=1e-5, msg=f"call {step}")


def test_the_proof_sees_a_buffer_that_evaluation_writes_in_another_order() -> None:
    model = Net(lambda s, x: (s.average.copy_(x.mean((0, 2, 3)).detach()), s.last(x))[1], average=torch.zeros(16)).eval()
    order = np.roll(np.arange(16), 1)
    moves = {"b.weight": {0: order}, "b.bias": {0: order}, "c.weight": {1: order}}
    assert all(c.passed for c in prove(model, Inputs.of(EXAMPLE), {**moves, "average": {0: order}}))
    assert not any(c.passed for c in prove(model, Inputs.of(EXAMPLE), moves))


@pytest.mark.parametrize(
    ("end", "operation"),
    [
        (lambda s, x: s.last(x) + x[x > 0].mean(), "aten.index"),
        (lambda s, x: s.last(x) + (x > 0).nonzero().float().mean(), "aten.nonzero"),
    ],
)
def test_sizes_that_depend_on_data_leave_the_model_as_it_is(end: Any, operation: str) -> None:
    model = Net(end)
    before, record = permuted(model)
    assert operation in record.reason
    assert record.reason.endswith("works on a size that only the data tell")
    assert all(torch.equal(v, before.state_dict()[k]) for k, v in model.state_dict().items())


def float32_only(s: Any, x: Tensor) -> Tensor:
    if x.dtype != torch.float32:
        raise AssertionError("needs float32")
    result: Tensor = s.last(x)
    return result


def test_a_proof_that_cannot_run_leaves_the_model_as_it_is() -> None:
    model = Net(float32_only)
    before, record = permuted(model)
    assert record.reason == "the proof cannot run: AssertionError: needs float32"
    assert not record.moves
    assert all(torch.equal(v, before.state_dict()[k]) for k, v in model.state_dict().items())


def test_training_that_no_capture_shows_is_run_and_compared() -> None:
    def end(s: Any, x: Tensor) -> Tensor:
        if s.training and bool(x.isfinite().all()):  # data decide: this branch cannot be captured
            x = torch.cumsum(x, 1)
        result: Tensor = s.last(x)
        return result

    model = Net(end)
    before, record = permuted(model)
    unchanged(before, model, train=True)
    assert any("the proof failed" in note and "an operation that runs in training only" in note for note in record.notes), record.notes
    assert 1 in record.moves["b.weight"]
    assert 1 not in record.moves.get("c.weight", {})
    assert {c.mode for c in record.checks} == {"eval", "leaves", "train"}


def drawn_by_bernoulli(x: Tensor) -> Tensor:
    return x.new_empty(1, 16, 1, 1).bernoulli_(0.5)


def drawn_by_dropout(x: Tensor) -> Tensor:
    return F.dropout(x.new_ones(1, 16, 1, 1), 0.5)


@pytest.mark.parametrize("draw", [drawn_by_bernoulli, drawn_by_dropout])
def test_what_one_random_mask_meets_twice_moves_together(draw: Callable[[Tensor], Tensor]) -> None:
    # Channel k of both values is dropped at once: another order on one side is another joint distribution.
    def end(s: Any, x: Tensor) -> Tensor:
        if not s.training:
            return s.last(x)  # type: ignore[no-any-return]
        mask = draw(x)
        return s.head((s.c(x * mask) * mask).mean((2, 3)))  # type: ignore[no-any-return]

    _, record = permuted(Net(end))
    assert record.moves["c.weight"][0].tolist() == record.moves["c.weight"][1].tolist()


def test_a_buffer_of_nan_does_not_make_the_proof_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, "aten.cumsum", RULES["aten.relu"])
    model = Net(lambda s, x: s.last(torch.cumsum(x * s.factor[:, None, None], 1)), factor=torch.full((16,), float("nan")))
    _, record = permuted(model)
    assert any("the proof failed" in note for note in record.notes)
    assert 1 not in record.moves.get("c.weight", {})
    redraw(model)
    assert torch.isfinite(model.factor).all()


def test_a_redrawn_network_without_any_number_proves_nothing() -> None:
    model = Net(lambda s, x: s.last(x) * float("nan"))
    before, record = permuted(model)
    assert any("the proof failed (error inf)" in note for note in record.notes)
    assert not record.moves
    assert all(torch.equal(v, before.state_dict()[k]) for k, v in model.state_dict().items())


def test_a_weight_that_no_capture_reads_stays() -> None:
    model = Net(lambda s, x: s.last(x), extra=nn.Linear(16, 16))
    _, record = permuted(model, targets={"c.weight": 1, "extra.weight": 1})
    reasons = {layer.name: layer.reason for layer in record.layers}
    assert reasons["extra.weight"] == "no capture reaches it"
    assert "extra.weight" not in record.moves


def test_gradients_move_with_their_parameters_and_back() -> None:
    model = Net(lambda s, x: s.last(x)).eval()
    model(EXAMPLE).square().sum().backward()
    first = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    record = permute(model, EXAMPLE, seconds=0.1)
    held = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(EXAMPLE).square().sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(held[name], p.grad, rtol=1e-4, atol=1e-5)
    assert not torch.equal(held["b.weight"], first["b.weight"])
    for name, p in model.named_parameters():
        p.grad = held[name]
    undo(model, record, None)
    assert all(torch.equal(p.grad, first[n]) for n, p in model.named_parameters() if p.grad is not None)


def test_a_checkpoint_of_a_wrapper_is_not_passed_through_unmapped() -> None:
    model = Net(lambda s, x: s.last(x))
    _, record = permuted(model)
    wrapped = {f"module.{n}": t for n, t in model.state_dict().items()}
    with pytest.raises(InputError, match=r"tensors name 'module\..*', expected '.*' as in the model that was permuted; strip 'module\.'"):
        record.to_old(wrapped)
    assert record.to_old({"other": EXAMPLE})["other"] is EXAMPLE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_models_in_narrow_formats_are_proven_in_float64(dtype: torch.dtype) -> None:
    model = Net(lambda s, x: s.last(x)).to(dtype).eval()
    before = copy.deepcopy(model)
    record = permute(model, EXAMPLE.to(dtype), seconds=0.1)
    assert {c.dtype for c in record.checks} == {"float64"}
    assert record.permuted_share == 1.0
    assert model.b.weight.dtype == dtype
    unchanged(before, model)


def test_a_shared_module_and_several_inputs_and_outputs() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.mix, self.norm = nn.Linear(8, 16), nn.Linear(6, 16), nn.Linear(16, 16), nn.LayerNorm(16)
            self.head = nn.Linear(16, 3)

        def forward(self, x: Tensor, y: Tensor) -> dict[str, Any]:
            u, v = self.mix(torch.relu(self.mix(self.one(x)))), self.mix(self.norm(self.two(y)))
            return {"sum": self.head(torch.relu(u) + v), "parts": (self.head(v), v.mean(-1))}

    torch.manual_seed(0)
    model = Shared().eval()
    redraw(model)
    x, y = torch.randn(2, 8), torch.randn(2, 6)
    before = model(x, y)
    record = permute(model, (x, y), seconds=0.1, targets={"mix.weight": 1})
    assert record.kept_after > record.kept_before
    # The module's result is its own input: both sides of its weight follow one order, as do both producers.
    order = record.moves["mix.weight"][1].tolist()
    assert (
        order == record.moves["mix.weight"][0].tolist() == record.moves["one.weight"][0].tolist() == record.moves["two.weight"][0].tolist()
    )
    torch.testing.assert_close(model(x, y), before, rtol=1e-4, atol=1e-5)
