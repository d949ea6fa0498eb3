"""`hold` under every way to step: each pruned weight is exactly +0 after every step, whatever computed the step."""

import contextlib
import copy
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from twofour.errors import InputError, VerificationError
from twofour.exchange import export
from twofour.pruning import Pruning, prune
from twofour.pruning.permutation import permute
from twofour.pruning.permutation.record import Permutation, carried, carry
from twofour.sources.models import DemoNet
from twofour.training import Checkpoint, derive_masks, hold
from twofour.training.order import carried_orders, permute_average, permute_state


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4))


def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(32, 16, generator=generator), torch.randint(0, 4, (32,), generator=generator)


def loss_of(model: nn.Module, seed: int) -> torch.Tensor:
    inputs, targets = batch(seed)
    return nn.functional.cross_entropy(model(inputs), targets)


def pruned_network(seed: int = 0) -> tuple[nn.Module, Any]:
    model = network(seed)
    return model, prune(model, (batch(0)[0],), permute=False)


def assert_held(model: nn.Module, masks: dict[str, torch.Tensor]) -> None:
    for name, mask in masks.items():
        dropped = model.get_parameter(name).detach()[~mask]
        assert dropped.numel()
        # +0 in its bits: -0 would be a set sign.
        assert not dropped.view(torch.int32).any(), name


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> None:
    for seed in seeds:
        optimizer.zero_grad()
        loss_of(model, seed).backward()
        optimizer.step()


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2, nesterov=True, foreach=False),
    "sgd foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2, foreach=True),
    "sgd fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, foreach=False),
    "adam foreach": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True, foreach=True),
    "adam fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_optimizer_is_held(kind: str) -> None:
    model, pruning = pruned_network()
    optimizer = OPTIMIZERS[kind](model.parameters())
    before = copy.deepcopy(model.state_dict())
    handle = hold(model, optimizer, pruning)
    for seed in range(4):
        steps(model, optimizer, range(seed, seed + 1))
        assert_held(model, pruning.masks)
    assert handle.num_steps == 4
    handle.check()
    for name, mask in pruning.masks.items():
        assert (model.get_parameter(name).detach() != before[name])[mask].float().mean() > 0.5  # the kept ones train
    handle.remove()
    handle.remove()
    steps(model, optimizer, range(1))
    with pytest.raises(VerificationError):
        handle.check()


def test_several_groups_and_a_frozen_weight() -> None:
    model, pruning = pruned_network()
    model[0].weight.requires_grad_(False)
    optimizer = torch.optim.AdamW([{"params": [model[3].weight], "lr": 0.1}, {"params": [model[5].weight, model[5].bias]}], lr=0.01)
    with hold(model, optimizer, pruning):
        steps(model, optimizer, range(3))
        assert_held(model, pruning.masks)


def test_weights_of_another_optimizer_are_named(caplog: pytest.LogCaptureFixture) -> None:
    model, pruning = pruned_network()
    with caplog.at_level("WARNING", logger="twofour"):
        hold(model, torch.optim.SGD([model[3].weight], lr=0.1), pruning).remove()
    assert [r.getMessage() for r in caplog.records if r.name.startswith("twofour")] == [
        "hold: 1 pruned weights are not trained by this optimizer (first: 0.weight); hold the optimizer that trains them too"
    ]
    caplog.clear()
    hold(model, torch.optim.SGD(model.parameters(), lr=0.1), pruning).remove()
    assert not [r for r in caplog.records if r.name.startswith("twofour")]


def test_a_model_pruned_in_its_wrapping_is_held_in_it() -> None:
    model = network()
    compiled = torch.compile(model, backend="aot_eager")
    pruning = prune(compiled, (batch(0)[0],), permute=False)
    assert set(pruning.masks) == {"_orig_mod.0.weight", "_orig_mod.3.weight"}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with hold(compiled, optimizer, pruning):
        steps(compiled, optimizer, range(2))
        assert_held(compiled, pruning.masks)


def test_lbfgs_stays_among_the_kept_weights_and_finds_their_least_squares() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 4, bias=False), nn.Identity()).double()
    inputs, targets = torch.randn(64, 8, dtype=torch.float64), torch.randn(64, 4, dtype=torch.float64)
    mask = prune(model, (inputs,), include=["0"], permute=False).masks["0.weight"]
    optimizer = torch.optim.LBFGS(
        model.parameters(), lr=1, max_iter=60, line_search_fn="strong_wolfe", tolerance_grad=0, tolerance_change=0
    )
    seen = []

    def closure() -> torch.Tensor:
        seen.append(int(torch.count_nonzero(model[0].weight.detach()[~mask])))
        optimizer.zero_grad()
        loss = ((model(inputs) - targets) ** 2).mean()
        loss.backward()
        return loss

    with hold(model, optimizer):
        for _ in range(3):
            optimizer.step(closure=closure)
    assert len(seen) > 3
    assert not any(seen)  # every evaluation inside the step saw the pruned network
    for row in range(4):
        kept = mask[row]
        best = np.linalg.lstsq(inputs[:, kept].numpy(), targets[:, row].numpy(), rcond=None)[0]
        # The line search ends where the gradient is rounding: √eps of float64 in the weights is ample.
        np.testing.assert_allclose(model[0].weight.detach()[row, kept].numpy(), best, atol=2.0**-26)


@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler_steps_and_skips(fused: bool) -> None:
    model, pruning = pruned_network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    with hold(model, optimizer, pruning) as handle:
        for seed, poison in ((0, False), (1, True), (2, False)):
            before = model[3].weight.detach().clone()
            optimizer.zero_grad()
            scaler.scale(loss_of(model, seed)).backward()
            if poison:
                model[3].weight.grad[0, 0] = float("inf")
            scaler.step(optimizer)
            scaler.update()
            assert torch.equal(before, model[3].weight.detach()) == poison
            assert_held(model, pruning.masks)
        assert scaler.get_scale() < 2.0**8  # a step was skipped
        assert handle.num_steps == 2  # a fused optimizer is called and skips inside


def test_a_gradient_that_is_not_finite_leaves_zeros_at_zero() -> None:
    model, pruning = pruned_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with hold(model, optimizer, pruning):
        loss_of(model, 0).backward()
        model[3].weight.grad.fill_(float("nan"))
        optimizer.step()
        assert_held(model, pruning.masks)


def test_accumulated_gradients_are_one_step() -> None:
    (together, pruning), (apart, _) = pruned_network(), pruned_network()
    results = []
    for model, parts in ((together, 1), (apart, 4)):
        model.eval()  # batch statistics would differ between the parts
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with hold(model, optimizer, pruning) as handle:
            inputs, targets = batch(0)
            for x, y in zip(inputs.chunk(parts), targets.chunk(parts), strict=True):
                (nn.functional.cross_entropy(model(x), y) / parts).backward()
            optimizer.step()
            assert handle.num_steps == 1
        results.append(model[3].weight.detach())
        assert_held(model, pruning.masks)
    # Two sums of 32 terms in fp32.
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=64 * 2.0**-24)


def test_clipping_sees_the_pruned_places_unless_asked_not_to() -> None:
    model, pruning = pruned_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with hold(model, optimizer, pruning) as handle:
        loss_of(model, 0).backward()
        everything = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
        kept = torch.stack(
            [(p.grad * pruning.masks[n] if n in pruning.masks else p.grad).norm() for n, p in model.named_parameters()]
        ).norm()
        assert kept < everything
        torch.testing.assert_close(nn.utils.clip_grad_norm_(model.parameters(), 1e9), everything)
        handle.mask_gradients()
        torch.testing.assert_close(nn.utils.clip_grad_norm_(model.parameters(), 1e9), kept)
        optimizer.step()
        assert_held(model, pruning.masks)


def test_an_average_begun_before_pruning_is_masked_when_given() -> None:
    model = network()
    averages = [AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)), copy.deepcopy(model)]
    averages[0].update_parameters(model)
    pruning = prune(model, (batch(0)[0],), permute=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with hold(model, optimizer, pruning, ema=averages):
        for seed in range(3):
            steps(model, optimizer, range(seed, seed + 1))
            averages[0].update_parameters(model)
        assert_held(averages[0].module, pruning.masks)
        assert_held(averages[1], pruning.masks)
    averages[1].get_parameter("3.weight").data.fill_(1)
    with (
        pytest.raises(VerificationError, match=r"hold: weight '3\.weight' of ema has \d+ non-zeros where it was pruned"),
        hold(model, optimizer, pruning, ema=averages),
    ):
        averages[1].get_parameter("3.weight").data.fill_(1)


def test_an_average_begun_before_pruning_and_not_given_is_found_where_it_is_used() -> None:
    model = network()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    average.update_parameters(model)
    pruning = prune(model, (batch(0)[0],), permute=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def train_and_swap() -> None:
        with hold(model, optimizer, pruning):
            steps(model, optimizer, range(2))
            average.update_parameters(model)
            model.load_state_dict(average.module.state_dict())

    with pytest.raises(VerificationError, match="an average begun before pruning"):
        train_and_swap()


def test_an_average_of_another_model_is_refused() -> None:
    model, pruning = pruned_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(InputError, match=r"hold: the mask '0\.weight' belongs to no parameter of ema; give the model that was pruned"):
        hold(model, optimizer, pruning, ema=nn.Linear(2, 2))
    with pytest.raises(
        InputError, match=r"hold: mask '0\.weight' has shape \[32, 16\], its weight in ema \[16, 16\]; prune the model again"
    ):
        hold(model, optimizer, pruning, ema=nn.Sequential(nn.Linear(16, 16)))


@pytest.mark.parametrize("ema", ["x", None, 3, [nn.Linear(2, 2).state_dict()]])
def test_an_average_that_is_no_module_is_refused(ema: Any) -> None:
    model, pruning = pruned_network()
    with pytest.raises(InputError, match=r"^hold: ema is .*, expected a module \(AveragedModel or a copy of the model\) or several$"):
        hold(model, torch.optim.SGD(model.parameters(), lr=0.1), pruning, ema=ema)


def test_two_models_are_held_apart() -> None:
    (a, of_a), (b, of_b) = pruned_network(1), pruned_network(2)
    for_a, for_b = torch.optim.SGD(a.parameters(), lr=0.1), torch.optim.Adam(b.parameters(), lr=0.01)
    dense = network(3)
    for_dense = torch.optim.SGD(dense.parameters(), lr=0.1)
    hold_a, hold_b = hold(a, for_a, of_a), hold(b, for_b, of_b)
    for seed in range(2):
        steps(a, for_a, range(seed, seed + 1))
        steps(b, for_b, range(seed, seed + 1))
        steps(dense, for_dense, range(seed, seed + 1))
    assert_held(a, of_a.masks)
    assert_held(b, of_b.masks)
    assert not derive_masks(dense)
    hold_a.remove()
    steps(a, for_a, range(1))
    steps(b, for_b, range(1))
    assert not derive_masks(a)
    assert_held(b, of_b.masks)
    hold_b.check()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["copied", "unpickled"])  # noqa: S301
def test_an_optimizer_that_lost_its_hooks_is_found_and_held_again(copied: Callable[[Any], Any]) -> None:
    model, pruning = pruned_network()
    handle = hold(model, torch.optim.SGD(model.parameters(), lr=0.1), pruning)
    model, optimizer = copied((model, handle.optimizer))
    handle = hold(model, torch.optim.SGD(model.parameters(), lr=0.1), pruning)
    steps(model, optimizer, range(1))
    message = r"hold: weight '0\.weight' of the model has \d+ non-zeros where it was pruned, expected none; a copied or unpickled optimizer"
    with pytest.raises(VerificationError, match=message):
        handle.check()
    with hold(model, optimizer, pruning):
        steps(model, optimizer, range(2))
        assert_held(model, pruning.masks)


def test_a_copy_that_stepped_without_its_hooks_is_told_why() -> None:
    model, pruning = pruned_network()
    handle = hold(model, torch.optim.SGD(model.parameters(), lr=0.1), pruning)
    model, optimizer = copy.deepcopy((model, handle.optimizer))
    steps(model, optimizer, range(1))
    handle.check()  # the copy is another model
    groups = [w.detach().unflatten(1, (-1, 4)) for w in (model[0].weight, model[3].weight, model[5].weight)]
    dense = sum(int(((g != 0).sum(2) > 2).sum()) for g in groups)
    total = sum(g.shape[0] * g.shape[1] for g in groups)
    message = (
        rf"a copied or unpickled optimizer has lost them\) has filled pruned places since \({dense} of {total} groups hold more than two "
        r"non-zeros now\): restore the pruned checkpoint, or pass pruning=$"
    )
    with pytest.raises(InputError, match=message):
        hold(model, optimizer)
    with hold(model, optimizer, pruning):
        steps(model, optimizer, range(1))
        assert_held(model, pruning.masks)


def test_an_average_that_was_not_given_is_found_by_export_with_the_record_only(tmp_path: Path) -> None:
    model = network()
    average = copy.deepcopy(model)
    pruning = prune(model, (batch(0)[0],), permute=False)
    hold(model, torch.optim.SGD(model.parameters(), lr=0.1), pruning).check()
    with pytest.raises(VerificationError, match=r"is not 2:4 in \d+ layers?"):
        export(average.eval(), (batch(0)[0],), tmp_path / "average.onnx", pruning=pruning)
    export(average.eval(), (batch(0)[0],), tmp_path / "average.onnx")


def test_a_parameter_replaced_after_hold_is_found() -> None:
    model, pruning = pruned_network()
    handle = hold(model, torch.optim.SGD(model.parameters(), lr=0.1), pruning)
    model[3].weight = nn.Parameter(model[3].weight.detach().clone())
    with pytest.raises(
        VerificationError, match=r"hold: parameter '3\.weight' was replaced after hold was called, expected the same object"
    ):
        handle.check()


def test_accelerate_and_lightning_optimizers_are_unwrapped() -> None:
    from accelerate import Accelerator
    from lightning.pytorch.core.optimizer import LightningOptimizer

    accelerator = Accelerator(cpu=True)
    plain, pruning = pruned_network()
    model, optimizer = accelerator.prepare(plain, torch.optim.AdamW(plain.parameters(), lr=0.01))
    with hold(model, optimizer, pruning):
        for seed in range(3):
            optimizer.zero_grad()
            accelerator.backward(loss_of(model, seed))
            optimizer.step()
            assert_held(plain, pruning.masks)
    inner = torch.optim.SGD(plain.parameters(), lr=0.1)
    assert hold(plain, LightningOptimizer(inner), pruning).optimizer is inner
    with pytest.raises(InputError, match=r"hold: object is not a torch\.optim\.Optimizer and wraps none; pass the optimizer that steps"):
        hold(plain, object(), pruning)


def test_a_compiled_step_and_a_compiled_model() -> None:
    model, pruning = pruned_network()
    compiled = torch.compile(model, backend="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.1))
    with hold(compiled, optimizer, pruning):

        @torch.compile(backend="aot_eager")
        def step() -> None:
            optimizer.step()

        for seed in range(3):
            optimizer.zero_grad()
            loss_of(compiled, seed).backward()
            before = model[3].weight.detach().clone()
            step()
            assert not torch.equal(before, model[3].weight.detach())
            assert_held(model, pruning.masks)


def test_masks_of_a_saved_model_are_those_it_was_trained_with(tmp_path: Path) -> None:
    model, pruning = pruned_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with hold(model, optimizer, pruning):
        steps(model, optimizer, range(2))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    assert load_file(tmp_path / "model.safetensors").keys() == network().state_dict().keys()
    loaded = network(5)
    loaded.load_state_dict(load_file(tmp_path / "model.safetensors"))
    masks = derive_masks(loaded)
    assert masks.keys() == pruning.masks.keys()
    assert all(torch.equal(masks[name], mask) for name, mask in pruning.masks.items())


def test_training_resumed_in_the_middle_ends_where_the_whole_would(tmp_path: Path) -> None:
    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = network()
        return model, torch.optim.AdamW(model.parameters(), lr=0.01)

    model, optimizer = make()
    prune(model, (batch(0)[0],), permute=False)
    with hold(model, optimizer):
        steps(model, optimizer, range(3))
        save_file(model.state_dict(), tmp_path / "model.safetensors")
        torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
        steps(model, optimizer, range(3, 6))
    resumed, optimizer = make()
    resumed.load_state_dict(load_file(tmp_path / "model.safetensors"))
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    with hold(resumed, optimizer):
        steps(resumed, optimizer, range(3, 6))
    for name, value in model.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_tied_and_shared_weights_are_held_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)
            self.down.weight = self.up.weight
            self.again = self.up

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.again(torch.relu(self.down(torch.relu(self.up(x))))))

    torch.manual_seed(0)
    model = Tied()
    pruning = prune(model, (batch(0)[0],), permute=False)
    assert list(pruning.masks) == ["up.weight"]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with hold(model, optimizer, pruning):
        steps(model, optimizer, range(2))
        assert_held(model, pruning.masks)
    assert model.down.weight is model.up.weight


def orders_of() -> dict[str, dict[int, np.ndarray]]:
    order = np.random.default_rng(0).permutation(32)
    return {"0.weight": {0: order}, "0.bias": {0: order}, "1.weight": {0: order}, "1.bias": {0: order}, "3.weight": {1: order}}


def reorder(model: nn.Module) -> None:
    orders = orders_of()
    order = torch.from_numpy(orders["0.bias"][0])
    with torch.no_grad():
        for name, axes in orders.items():
            for axis in axes:
                model.get_parameter(name).copy_(model.get_parameter(name).index_select(axis, order))
        for name in ("running_mean", "running_var"):
            getattr(model[1], name).copy_(getattr(model[1], name)[order])


def test_state_older_than_a_reordering_is_refused_and_can_be_permuted() -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    steps(model, optimizer, range(3))
    older = copy.deepcopy(optimizer.state_dict())
    reorder(model)
    pruning = prune(model, (batch(0)[0],), permute=False)
    message = "hold: the optimizer's state of '.*' is older than the reordering of its channels, expected the new order; make the optimizer"
    with pytest.raises(InputError, match=message):
        hold(model, optimizer, pruning, orders=orders_of())
    assert not optimizer._optimizer_step_post_hooks
    moments = {n: optimizer.state[p]["exp_avg"].clone() for n, p in model.named_parameters()}
    assert permute_state(model, optimizer, orders_of()) == 10  # two moments of five parameters
    for name, parameter in model.named_parameters():
        for axis, order in orders_of().get(name, {}).items():
            moments[name] = moments[name].index_select(axis, torch.from_numpy(order))
        assert torch.equal(optimizer.state[parameter]["exp_avg"], moments[name])
    with pytest.raises(InputError, match=r"permute_state: the state of '0\.weight' follows this reordering already, expected older state"):
        permute_state(model, optimizer, orders_of())
    with hold(model, optimizer, pruning, orders=orders_of()):
        steps(model, optimizer, range(1))
        saved = copy.deepcopy(optimizer.state_dict())
        optimizer.load_state_dict(saved)
        with pytest.raises(InputError, match="is older than the reordering"):
            optimizer.load_state_dict(older)
        optimizer.load_state_dict(saved)


def test_a_permuted_state_steps_as_the_straight_one_does() -> None:
    # In eval mode every bias has a gradient; ahead of batch statistics it would be rounding alone, which Adam blows up.
    straight = network().double().eval()
    optimizer = torch.optim.Adam(straight.parameters(), lr=0.01)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        inputs, targets = batch(seed)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs.double()), targets).backward()
        optimizer.step()

    for seed in range(3):
        step(straight, optimizer, seed)
    twin, twin_optimizer = copy.deepcopy((straight, optimizer))
    reorder(twin)
    permute_state(twin, twin_optimizer, orders_of())
    step(straight, optimizer, 3)
    step(twin, twin_optimizer, 3)
    reorder(straight)
    for name, parameter in straight.named_parameters():
        # Sums of 32 terms in another order, divided by moments of about 1e-3.
        torch.testing.assert_close(parameter, twin.get_parameter(name), rtol=0, atol=32e3 * 2.0**-53)


def test_a_reordering_the_model_carries_is_found() -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    steps(model, optimizer, range(1))
    reorder(model)
    carry(model, Permutation(moves=orders_of()))
    pruning = prune(model, (batch(0)[0],), permute=False)
    with pytest.raises(InputError, match="is older than the reordering of its channels"):
        hold(model, optimizer, pruning)
    hold(model, optimizer, pruning, orders={}).remove()
    permute_state(model, optimizer, carried_orders(model))
    hold(model, optimizer, pruning).remove()


def test_a_new_optimizer_after_a_reordering_is_taken_and_marked() -> None:
    model = network()
    reorder(model)
    pruning = prune(model, (batch(0)[0],), permute=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with hold(model, optimizer, pruning, orders=orders_of()):
        steps(model, optimizer, range(2))
    with hold(model, optimizer, pruning, orders=orders_of()) as held:  # its state is of the new order: the mark says so
        steps(model, optimizer, range(1))
        assert held.num_steps == 1
        assert not any(held.violations().values())


def test_nothing_to_hold_and_the_wrong_optimizer_are_refused() -> None:
    model, pruning = pruned_network()
    with pytest.raises(InputError, match=r"hold: no weight of the model is 2:4, expected a pruned model; call twofour\.prune first"):
        hold(network(), torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(InputError, match="hold: the optimizer trains none of the pruned weights, expected an optimizer made from this"):
        hold(model, torch.optim.SGD(network().parameters(), lr=0.1), pruning)


def test_holding_costs_at_most_three_percent_of_a_step() -> None:
    # 0.27 million weights in 19 layers of 32×32 images, the size of ResNet-20; the demo network has the same build.
    model = nn.Sequential(nn.Conv2d(3, 1, 1), DemoNet(width=32))
    x, y = torch.randn(64, 3, 32, 32), torch.randint(0, 10, (64,))
    pruning = prune(model, (x[:2],), permute=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    handle = hold(model, optimizer, pruning)
    whole, held = [], []
    for _ in range(3):
        start = time.perf_counter()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        whole.append(time.perf_counter() - start)
    for _ in range(20):
        start = time.perf_counter()
        handle.apply()
        held.append(time.perf_counter() - start)
    assert min(held) <= 0.03 * min(whole), (held, whole)


def test_the_with_block_lets_go_also_when_its_body_fails() -> None:
    model, pruning = pruned_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with contextlib.suppress(ZeroDivisionError), hold(model, optimizer, pruning):
        raise ZeroDivisionError
    steps(model, optimizer, range(1))
    assert not derive_masks(model)


def test_state_from_before_a_real_permutation_is_refused_then_brought_along() -> None:
    torch.manual_seed(0)
    # Groups of large channels beside groups of small ones: the search has something to gain, so channels move.
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    with torch.no_grad():
        model[2].weight.mul_(torch.tensor([4.0, 4.0, 4.0, 4.0, 0.1, 0.1, 0.1, 0.1]).repeat(4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    steps(model, optimizer, range(2))
    before = optimizer.state[model[2].weight]["momentum_buffer"].clone()
    permutation = permute(model, batch(0)[0], seconds=1.0)
    assert permutation.moves["2.weight"][1] is not None
    pruning = prune(model, (batch(0)[0],), permute=False)
    with pytest.raises(InputError, match="is older than the reordering of its channels"):
        hold(model, optimizer, pruning)
    permute_state(model, optimizer, carried_orders(model))
    order = torch.from_numpy(permutation.moves["2.weight"][1])
    rows = permutation.moves["2.weight"].get(0)
    moved = before[:, order] if rows is None else before[torch.from_numpy(rows)][:, order]
    assert torch.equal(optimizer.state[model[2].weight]["momentum_buffer"], moved)
    with hold(model, optimizer, pruning):
        steps(model, optimizer, range(2, 4))
        assert_held(model, pruning.masks)


def skewed(seed: int = 0) -> nn.Module:
    """Groups of large channels beside groups of small ones: the search has something to gain, so channels move."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    with torch.no_grad():
        model[2].weight.mul_(torch.tensor([4.0, 4.0, 4.0, 4.0, 0.1, 0.1, 0.1, 0.1]).repeat(4))
    return model


@pytest.mark.parametrize("averaged", [copy.deepcopy, AveragedModel], ids=["copy", "AveragedModel"])
def test_an_average_in_the_old_channel_order_is_refused_then_brought_along(averaged: Callable[[nn.Module], nn.Module]) -> None:
    model, inputs = skewed(), batch(0)[0]
    average = averaged(model)
    before, outputs = copy.deepcopy(average.state_dict()), average(inputs)
    pruning = prune(model, (inputs,), permute=1.0)
    assert carried_orders(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(InputError, match=r"hold: ema carries no reordering of channels and the model was reordered .*permute_average"):
        hold(model, optimizer, pruning, ema=average)
    assert all(torch.equal(value, before[name]) for name, value in average.state_dict().items())
    assert not optimizer._optimizer_step_post_hooks
    assert permute_average(model, average) == len(carried_orders(model))
    # Sums of 32 terms in another order, through three layers; the outputs are of order 1.
    torch.testing.assert_close(average(inputs), outputs, rtol=0, atol=3 * 32 * 2.0**-23)
    with pytest.raises(InputError, match="permute_average: the average carries a reordering already, expected an older one; call it once"):
        permute_average(model, average)
    hold(model, optimizer, pruning, ema=average).remove()
    # Masked in the same order, the same dense weights are the pruned model.
    torch.testing.assert_close(average(inputs), model(inputs), rtol=0, atol=0)


def test_an_average_in_the_new_channel_order_is_accepted() -> None:
    model, inputs = skewed(), batch(0)[0]
    pruning = prune(model, (inputs,), permute=1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loaded, strange = skewed(1), skewed(2)
    loaded.load_state_dict(model.state_dict())
    averages = [copy.deepcopy(model), AveragedModel(model), loaded]
    with hold(model, optimizer, pruning, ema=averages):
        steps(model, optimizer, range(1))
    assert not torch.equal(loaded[2].weight, model[2].weight)
    hold(model, optimizer, pruning, ema=averages).remove()  # the loaded copy lags behind now, and is known
    with pytest.raises(InputError, match="ema carries no reordering"):
        hold(model, optimizer, pruning, ema=strange)
    hold(model, optimizer, pruning, ema=strange, orders={}).remove()


def test_what_is_no_older_average_cannot_be_permuted() -> None:
    model, inputs = skewed(), batch(0)[0]
    with pytest.raises(InputError, match="permute_average: the model carries no reordering of its channels"):
        permute_average(model, copy.deepcopy(model))
    permute(model, inputs, seconds=1.0)
    with pytest.raises(InputError, match=r"permute_average: the average has no tensor '.*', expected an average of this model"):
        permute_average(model, nn.Linear(2, 2))


@pytest.mark.parametrize("initial", [0.0, 0.1])
def test_state_that_was_filled_but_never_stepped_is_not_older(initial: float) -> None:
    model = skewed()
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.01, initial_accumulator_value=initial)
    assert optimizer.state[model[2].weight]["sum"].unique().tolist() == pytest.approx([initial])
    pruning = prune(model, (batch(0)[0],), permute=1.0)
    assert carried_orders(model)
    with hold(model, optimizer, pruning):
        steps(model, optimizer, range(1))
    stale = torch.optim.Adagrad(model.parameters(), lr=0.01)
    steps(model, stale, range(1))
    with pytest.raises(InputError, match="is older than the reordering"):
        hold(model, stale, pruning)


def test_state_mapped_by_the_permutation_is_known_by_its_mark() -> None:
    model = skewed()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    steps(model, optimizer, range(2))
    old, names = optimizer.state_dict(), [name for name, _ in model.named_parameters()]
    permutation = permute(model, batch(0)[0], seconds=1.0)
    pruning = prune(model, (batch(0)[0],), permute=False)
    new = permutation.optimizer_to_new(old, names)
    with pytest.raises(
        InputError, match="optimizer_to_new: the state follows this permutation already, expected older state; call it once"
    ):
        permutation.optimizer_to_new(new, names)
    again = torch.optim.AdamW(model.parameters(), lr=0.01)
    again.load_state_dict(new)
    with hold(model, again, pruning):
        steps(model, again, range(1))
    again.load_state_dict(permutation.optimizer_to_old(new, names))
    with pytest.raises(InputError, match="is older than the reordering"):
        hold(model, again, pruning)


def test_state_older_than_a_recorded_reordering_is_refused_in_a_new_process(tmp_path: Path) -> None:
    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = skewed()
        return model, torch.optim.AdamW(model.parameters(), lr=0.01)

    model, optimizer = make()
    steps(model, optimizer, range(2))
    older = copy.deepcopy(optimizer.state_dict())
    pruning = prune(model, (batch(0)[0],), permute=1.0)
    carried(model).save(tmp_path / "order.safetensors")
    Checkpoint.of(model, "accuracy", 0.0, pruning=pruning).save(tmp_path / "model.safetensors")

    record = Checkpoint.pruning_of(tmp_path / "model.safetensors")
    loaded, fresh = make()
    loaded.load_state_dict(load_file(tmp_path / "model.safetensors"))
    message = r"hold: the optimizer's state of '0\.weight' is older than the reordering of its channels"
    fresh.load_state_dict(older)
    with pytest.raises(InputError, match=message):
        hold(loaded, fresh, record)
    hold(loaded, fresh, record, orders={}).remove()
    orders = Permutation.load(tmp_path / "order.safetensors").moves
    permute_state(loaded, fresh, orders)
    with hold(loaded, fresh, record):
        steps(loaded, fresh, range(1))
        newer = copy.deepcopy(fresh.state_dict())
        with pytest.raises(InputError, match=message):
            fresh.load_state_dict(older)
        fresh.load_state_dict(newer)

    # An optimizer that is new is marked, and so is what it saves.
    another = torch.optim.AdamW(loaded.parameters(), lr=0.01)
    with hold(loaded, another, record):
        steps(loaded, another, range(1))
    again, its = make()
    again.load_state_dict(loaded.state_dict())
    its.load_state_dict(another.state_dict())
    hold(again, its, record).remove()


def test_a_pruning_of_another_channel_order_is_refused() -> None:
    model = skewed()
    first = prune(model, (batch(0)[0],), permute=1.0)
    assert first.order
    assert Pruning.from_json(first.to_json()).order == first.order
    order = np.roll(np.arange(32), 1)
    carry(model, Permutation(moves={"0.bias": {0: order}}))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(InputError, match=r"hold: the pruning is of another channel order than the model's, expected its latest; prune it"):
        hold(model, optimizer, first)


def test_state_that_follows_an_earlier_reordering_is_not_reordered_again() -> None:
    model = nn.Linear(4, 4, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    permute_state(model, optimizer, {"weight": {1: [1, 0, 3, 2]}})
    before = optimizer.state[model.weight]["momentum_buffer"].clone()
    with pytest.raises(InputError, match=r"permute_state: the state of 'weight' follows an earlier reordering, expected state from before"):
        permute_state(model, optimizer, {"weight": {1: [3, 2, 1, 0]}})
    assert torch.equal(optimizer.state[model.weight]["momentum_buffer"], before)
