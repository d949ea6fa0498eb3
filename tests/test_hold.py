"""Held weights stay exactly +0 through any loop: optimizers, scaler, accumulation, processes."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

import twofour
from twofour.errors import InputError
from twofour.pruning import Pruning
from twofour.training import derive_masks

Made = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Made] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=1e-2),
    "sgd foreach": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, foreach=True),
    "sgd fused": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, fused=True),
    "adam": lambda p: torch.optim.Adam(p, 1e-2, foreach=False),
    "adam fused": lambda p: torch.optim.Adam(p, 1e-2, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1, foreach=True),
    "two groups": lambda p: torch.optim.AdamW([{"params": p[:3], "lr": 1e-3}, {"params": p[3:]}], 1e-2),
}


def assert_held(model: nn.Module, masks: dict[str, torch.Tensor]) -> None:
    for name, p in model.named_parameters():
        if name in masks:
            dropped = p.detach()[~masks[name]]
            assert not dropped.any(), name
            assert not torch.signbit(dropped).any(), name


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    x = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_holds(pruned_net: tuple[nn.Module, Pruning], name: str) -> None:
    model, record = pruned_net
    model.train()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    handle = twofour.hold(model, optimizer)
    for seed in range(3):
        step(model, optimizer, seed)
        assert_held(model, record.masks)
    assert handle.num_steps == 3
    # Kept weights do move, so the test would notice a loop that trains nothing.
    for n in record.masks:
        assert not torch.equal(dict(model.named_parameters())[n], before[n])


def test_without_hold_the_weights_come_back(pruned_net: tuple[nn.Module, Pruning]) -> None:
    model, record = pruned_net
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with twofour.hold(model, optimizer):
        step(model, optimizer, 0)
        assert_held(model, record.masks)
    step(model, optimizer, 1)
    with pytest.raises(AssertionError):
        assert_held(model, record.masks)


def test_a_nan_gradient_still_leaves_plus_zero(pruned_net: tuple[nn.Module, Pruning]) -> None:
    model, record = pruned_net
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    twofour.hold(model, optimizer)
    for p in model.parameters():
        p.grad = torch.full_like(p, float("nan"))
    optimizer.step()
    assert_held(model, record.masks)


def test_grad_scaler_and_accumulation(pruned_net: tuple[nn.Module, Pruning]) -> None:
    model, record = pruned_net
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    handle = twofour.hold(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    for micro in range(4):
        loss = model(torch.randn(4, 1, 8, 8)).square().mean() / 2
        if micro == 3:
            loss = loss * float("inf")
        scaler.scale(loss).backward()
        if micro % 2:
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            assert_held(model, record.masks)
    # The second step was skipped by the scaler: its gradients overflowed.
    assert handle.num_steps == 1


def test_masks_derived_from_the_weights_are_those_of_the_record(pruned_net: tuple[nn.Module, Pruning]) -> None:
    model, record = pruned_net
    derived = derive_masks(model)
    assert derived.keys() == record.masks.keys()
    assert all(torch.equal(derived[name], record.masks[name]) for name in derived)


def test_a_dense_model_is_refused(demo_net: nn.Module) -> None:
    with pytest.raises(InputError, match=r"no weight of the model is 2:4, expected a pruned model; call twofour.prune first"):
        twofour.hold(demo_net, torch.optim.SGD(demo_net.parameters(), 0.1))


def test_an_optimizer_of_another_model_is_refused(pruned_net: tuple[nn.Module, Pruning], demo_net: nn.Module) -> None:
    with pytest.raises(InputError, match="the optimizer trains none of the pruned weights"):
        twofour.hold(pruned_net[0], torch.optim.SGD(demo_net.parameters(), 0.1))


def test_masks_of_another_model_are_refused(pruned_net: tuple[nn.Module, Pruning]) -> None:
    other = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with pytest.raises(InputError, match=r"mask 'stages.0.conv1.weight' belongs to no parameter"):
        twofour.hold(other, torch.optim.SGD(other.parameters(), 0.1), pruned_net[1])
