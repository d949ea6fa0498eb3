"""The pruning methods on a GPU: the CPU's masks but for near ties, as good an output, the same notes; and a transformer block by block."""

import copy

import pytest
import torch
from test_pruning_blocks import MAKERS, made
from test_pruning_methods import (
    COMBINED,
    DEPENDENT,
    PRECISIONS,
    correlated,
    damping,
    problem,
    rescaled,
    result,
    statistics_of,
    summed,
    without_last_pivot,
)

from twofour.pattern import Pattern, count_groups
from twofour.pruning import prune, prune_blocks
from twofour.pruning.methods import METHODS
from twofour.pruning.methods.hessian import cholesky, inverse_factor, output_errors, why_singular
from twofour.pruning.methods.method import choose
from twofour.pruning.statistics import Part, Statistics

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", METHODS)
def test_the_choice_on_the_gpu_is_that_of_the_cpu(name: str) -> None:
    weight, x = problem(64, 128, rows=1024)
    weight = weight.float()
    here, there = statistics_of(x), statistics_of(x.cuda())
    expected = choose(weight, [Part(0, 64, here)], METHODS[name], Pattern())
    choice = choose(weight.cuda(), [Part(0, 64, there)], METHODS[name], Pattern())
    assert choice.mask.is_cuda
    # The same formula in float32 on both: scores that differ in the last bits may swap, and later columns follow in the updating methods.
    assert float((choice.mask.cpu() == expected.mask).float().mean()) > 0.98
    error, other = (output_errors(weight, result(c, w).cpu(), here)[0] for c, w in ((choice, weight.cuda()), (expected, weight)))
    assert error == pytest.approx(other, rel=0.05)


@pytest.mark.parametrize(("dtype", "sums"), PRECISIONS)
@pytest.mark.parametrize("rows", [4096, 100])
def test_the_gpu_says_the_same_of_singular_statistics(dtype: torch.dtype, sums: torch.dtype, rows: int) -> None:
    for seed in range(4):
        x = rescaled(correlated(4096, 64, seed), seed).to("cuda", dtype)
        assert why_singular(summed(x, sums, rows)) == "", seed
        for name, combine in DEPENDENT.items():
            combined = x.clone()
            combined[:, 30] = combine(x)
            assert why_singular(summed(combined, sums, rows)) == COMBINED, (seed, name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", [1, 2, 3, 32, 33, 64, 65, 128, 200, 1024])
def test_a_last_pivot_that_is_not_positive_is_seen_on_the_gpu(size: int, dtype: torch.dtype) -> None:
    matrix = without_last_pivot(size).to("cuda", dtype)
    factor, info = torch.linalg.cholesky_ex(matrix)
    # What this library says and leaves, for whoever reads a failure.
    told = (int(info), float(factor[-1, -1]))
    assert cholesky(matrix) is None, told
    sound = cholesky(matrix + 1.25 * torch.eye(size, dtype=dtype, device="cuda"))
    assert sound is not None
    assert bool(torch.isfinite(sound).all())
    if size > 1:
        assert why_singular(Statistics(size, matrix.diagonal().double(), matrix)) == COMBINED, told
        inverse, notes = inverse_factor(Statistics(size, torch.ones(size, device="cuda"), matrix.flip(0, 1)))
        assert bool(torch.isfinite(inverse).all()), told
        assert notes == (f"Hessian singular ({COMBINED}), damped by {damping(matrix.cpu())} % of its mean diagonal",), told


@pytest.mark.parametrize("name", ["wanda", "sparsegpt", "alps"])
def test_a_network_on_the_gpu_is_pruned_there(name: str) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 16, 3), torch.nn.Flatten(), torch.nn.Linear(256, 4)
    )
    model = model.cuda()
    batches = [torch.randn(16, 3, 8, 8) for _ in range(3)]
    record = prune(model, (batches[0][:2].cuda(),), method=name, calibration=batches, permute=False)
    for layer in record.pruned:
        assert record.masks[layer.name].is_cuda
        assert count_groups(model.get_parameter(layer.name).detach().cpu().numpy()).is_24


@pytest.mark.parametrize("architecture", MAKERS)
def test_a_model_in_host_memory_is_pruned_block_by_block_on_the_gpu(architecture: str) -> None:
    model, batches, example = made(MAKERS[architecture])
    here = copy.deepcopy(model)
    record = prune_blocks(model, example, batches, method="wanda", device="cuda")
    expected = prune_blocks(here, example, batches, method="wanda")
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())
    same = [float((record.masks[name] == mask).float().mean()) for name, mask in expected.masks.items()]
    assert min(same) > 0.98
