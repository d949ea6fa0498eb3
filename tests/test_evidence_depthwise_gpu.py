"""The depthwise convolutions of evidence/depthwise_training.py on a GPU: as float64 says, at any size, repeatable, and in a network."""

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytestmark = pytest.mark.gpu
sys.path.insert(0, str(Path(__file__).parent.parent / "evidence"))
# What MobileNetV2 has; odd sizes, where the last row and column of stride 2 have no neighbour; one pixel.
SHAPES = [
    (32, 32, 1), (96, 32, 1), (144, 32, 1), (144, 32, 2), (192, 16, 1), (192, 16, 2), (384, 8, 1), (576, 8, 1), (576, 8, 2), (960, 4, 1),
    (48, 17, 1), (48, 17, 2), (96, 31, 2), (16, 1, 1), (16, 1, 2),
]  # fmt: skip


def configurations() -> dict[str, list[int]]:
    """Return a choice for every kind and shape of MobileNetV2, each configuration in turn."""
    import depthwise_training as training

    found = {}
    for i, (channels, size, stride) in enumerate(training.SHAPES):
        by_kind: dict[str, list[tuple[int, ...]]] = {}
        for kind, configuration, _ in training.candidates(channels, size, stride):
            by_kind.setdefault(kind, []).append(configuration)
        for kind, those in by_kind.items():
            found[f"{kind} {channels}/{stride}"] = list(those[1 + i % (len(those) - 1)])
    return found


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """Let the kernels run, whatever is the fastest."""
    import depthwise_training as training

    found = configurations()
    monkeypatch.setattr(training, "choices", lambda: found)
    return found


@pytest.mark.parametrize("batch", [3, 64])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_configuration_is_the_convolution(shape: tuple[int, int, int], batch: int) -> None:
    import depthwise_training as training
    from kernel_choices import distance

    channels, size, stride = shape
    # So that sizes too small for a configuration's rows have them all too.
    candidates, operands = training.candidates(channels, max(size, 32), stride), training.operands(*shape, batch)
    exact = {kind: training.exact(stride, kind, operands) for kind in training.KINDS}
    for kind, configuration, call in candidates:
        found = call(*operands)
        # Sums in fp32, one rounding to bf16: 2^-9 an element.
        assert distance(found, exact[kind]) < 2**-8, (kind, configuration)
        if configuration:
            assert torch.equal(call(*operands), found), (kind, configuration)


@pytest.mark.parametrize("stride", [1, 2])
def test_the_operations_are_what_they_tell_the_compiler(stride: int, chosen: dict[str, list[int]]) -> None:
    import depthwise_training as training

    above, x, weight = training.operands(144, 32, stride, 3)
    checks = "test_schema", "test_autograd_registration", "test_faketensor"
    torch.library.opcheck(training.depthwise_conv, (x.requires_grad_(), weight.requires_grad_(), stride), test_utils=checks)
    for op in (training.depthwise_conv_input, training.depthwise_conv_weight):
        torch.library.opcheck(op, (above, x.detach(), weight.detach(), stride), test_utils=checks)


def outputs_and_gradients(model: nn.Module, x: Tensor, bf16: bool) -> list[Tensor]:
    x = x.detach().requires_grad_()
    with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
        y = model(x)
    up = torch.randn(y.shape, generator=torch.Generator("cuda").manual_seed(1), device="cuda")
    return [y.detach(), *torch.autograd.grad(y, [x, *model.parameters()], up.to(y.dtype))]


def errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]


def gathered(found: list[Tensor]) -> list[Tensor]:
    """Return the output and all gradients in one: some by themselves are next to nothing."""
    return [found[0], torch.cat([t.double().flatten() for t in found[1:]])]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_block_errs_no_more_than_with_the_librarys_convolutions(stride: int, compiled: bool, chosen: dict[str, list[int]]) -> None:
    from narrow import use_narrow
    from networks import Inverted

    torch.manual_seed(0)
    block = Inverted(24, 24, stride, 6).cuda().to(memory_format=torch.channels_last).train()
    ours = copy.deepcopy(block)
    assert use_narrow(ours) == 1
    x = torch.randn(16, 24, 32, 32, device="cuda").contiguous(memory_format=torch.channels_last)
    filters = 2 + next(i for i, p in enumerate(block.parameters()) if p.shape == (144, 1, 3, 3))
    run: Any = torch.compile(ours, fullgraph=True, dynamic=False) if compiled else ours
    exact = outputs_and_gradients(copy.deepcopy(block).double(), x.double(), False)
    theirs, mine = (errors(outputs_and_gradients(model, x, True), exact) for model in (block, run))
    for i in (0, 1, filters):  # output, gradients of the input and of the filters
        assert mine[i] <= 2 * theirs[i], (mine, theirs)


def test_all_depthwise_convolutions_of_a_network_run_here(chosen: dict[str, list[int]]) -> None:
    from narrow import use_narrow
    from networks import CifarMobileNetV2

    torch.manual_seed(0)
    model = CifarMobileNetV2().cuda().to(memory_format=torch.channels_last).train()
    ours = copy.deepcopy(model)
    assert use_narrow(ours) == 17
    x = torch.randn(128, 3, 32, 32, device="cuda").contiguous(memory_format=torch.channels_last)
    exact = gathered(outputs_and_gradients(copy.deepcopy(model).double(), x.double(), False))
    theirs = errors(gathered(outputs_and_gradients(model, x, True)), exact)
    mine = errors(gathered(outputs_and_gradients(ours, x, True)), exact)
    assert all(a <= 2 * b for a, b in zip(mine, theirs, strict=True)), (mine, theirs)
