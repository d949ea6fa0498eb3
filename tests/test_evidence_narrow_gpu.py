"""The narrow convolutions of evidence/narrow.py on a GPU: as float64 says, at any number of images, and repeatable."""

import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.gpu
sys.path.insert(0, str(Path(__file__).parent.parent / "evidence"))


@pytest.mark.parametrize("batch", [3, 64])
@pytest.mark.parametrize("shape", [(16, 32), (32, 16), (64, 8)])
def test_every_configuration_is_the_convolution(shape: tuple[int, int], batch: int) -> None:
    import narrow

    operands = narrow.operands(*shape, batch)
    for kind, configuration, call in narrow.candidates(shape[0]):
        found = call(*operands)
        # Sums in fp32, one rounding to bf16: 2^-9 an element.
        assert narrow.error(kind, found, *operands) < 2**-8, (kind, configuration)
        if configuration:
            assert torch.equal(call(*operands), found)
