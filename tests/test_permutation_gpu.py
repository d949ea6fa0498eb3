"""The search's values on a GPU, and a network permuted there. Run with `-m gpu`."""

import numpy as np
import pytest
import torch
from torch import nn

from twofour.pruning import prune
from twofour.pruning.permutation import permute
from twofour.pruning.permutation.search import search

pytestmark = pytest.mark.gpu


def columns(count: int, rows: int) -> np.ndarray:
    return np.abs(np.random.default_rng(0).standard_normal((count, rows))).astype(np.float32)


def test_the_search_on_the_gpu_repeats_and_finds_what_the_cpu_finds() -> None:
    drawn = columns(512, 384)
    here, again, cpu = (search(drawn, seed=3, device=device) for device in ("cuda", "cuda", None))
    assert np.array_equal(here.order, again.order)
    assert sorted(here.order) == list(range(512))
    gained, wanted = here.kept_after - here.kept_before, cpu.kept_after - cpu.kept_before
    # Both add the same float32 values in another order, so that rare ties fall to another column.
    assert gained >= 0.95 * wanted > 0


def test_a_network_on_the_gpu_is_permuted_there_and_computes_the_same() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, 320, 3, padding=1), nn.BatchNorm2d(320), nn.ReLU(), nn.Conv2d(320, 64, 3, padding=1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 8)),
    )
    net = net.eval().cuda()
    x = torch.randn(2, 3, 16, 16, device="cuda")
    with torch.no_grad():
        before = net.double()(x.double())
    found = permute(net.float(), (x,), seconds=5.0)
    assert found.kept_after > found.kept_before
    assert found.largest_error <= 1e-9
    with torch.no_grad():
        after = net.double()(x.double())
    assert float((after - before).abs().max() / before.abs().max()) <= 1e-9
    assert prune(net.float(), (x,), permute=False).kept_magnitude > 0
