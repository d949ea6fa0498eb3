"""The float64 matrix product against torch in float64, and the rule for infinities at pruned positions."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from twofour.errors import InputError
from twofour.oracle import gemm
from twofour.pattern import select

TORCH = {
    "none": lambda y: y,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
    "hardswish": F.hardswish,
}


@pytest.mark.parametrize("activation", sorted(TORCH))
@pytest.mark.parametrize("gated", [False, True])
def test_every_epilogue_is_torchs(activation: str, gated: bool) -> None:
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((5, 16)), rng.standard_normal((12, 16))
    weight = np.where(select(weight), weight, 0)
    scale, bias = rng.standard_normal(12), rng.standard_normal(12)
    residual = None if gated else rng.standard_normal((5, 12))
    y = torch.from_numpy(x @ weight.T * scale + bias + (0 if residual is None else residual))
    expected = TORCH[activation](y[:, :6]) * y[:, 6:] if gated else TORCH[activation](y)
    found = gemm(x, weight, activation=activation, scale=scale, bias=bias, residual=residual, gated=gated)
    assert np.allclose(found, expected.numpy(), rtol=1e-12, atol=1e-12)


def test_an_infinity_at_a_pruned_position_does_not_reach_the_output() -> None:
    x, weight = np.array([[np.inf, 1.0, 2.0, 3.0]]), np.array([[0.0, 0.0, 1.0, 1.0]])
    assert gemm(x, weight).tolist() == [[5.0]]
    assert np.isnan(gemm(x, weight, sparse=False)).all()
    # A group with one non-zero multiplies its lowest zero position as well.
    assert np.isnan(gemm(x, np.array([[0.0, 0.0, 1.0, 0.0]]))).all()


def test_an_unknown_activation_is_an_error() -> None:
    with pytest.raises(InputError, match=r"activation 'rellu' is not one of .*; did you mean 'relu'"):
        gemm(np.zeros((1, 4)), np.zeros((1, 4)), activation="rellu")
