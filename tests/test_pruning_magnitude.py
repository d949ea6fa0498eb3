"""Magnitude masks of torch tensors: equal to the oracle's choice in every dtype, on the path of every device, and fast."""

import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from twofour.errors import InputError
from twofour.pattern import Pattern
from twofour.pattern.mask import select_by_passes
from twofour.pruning import magnitude
from twofour.pruning.magnitude import magnitude_mask, n_largest, pattern_mask, transposable_mask, two_largest

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
SHAPES = [(8, 16), (8, 16, 3), (4, 8, 3, 3), (2, 4, 2, 2, 2)]


def drawn(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def expected(weight: torch.Tensor, n: int = 2, m: int = 4) -> np.ndarray:
    # float64 holds every value of the other formats, so its order is theirs.
    return select_by_passes(weight.double().numpy(), 1, n, m)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_mask_is_that_of_the_values(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = drawn(shape, dtype)
    np.testing.assert_array_equal(magnitude_mask(weight).numpy(), expected(weight))


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != torch.float64])
@given(data=st.data())
def test_ten_passes_choose_what_counting_chooses(dtype: torch.dtype, data: st.DataObject) -> None:
    values = data.draw(st.lists(st.floats(-2, 2, width=16), min_size=24, max_size=24))
    weight = torch.tensor(values).to(dtype).reshape(2, 4, 3)
    groups = weight.view(magnitude.BITS_OF[dtype])
    assert torch.equal(two_largest(groups), n_largest(groups, 2))
    assert torch.equal(two_largest(groups), magnitude_mask(weight))


@pytest.mark.parametrize(("n", "m"), [(1, 2), (3, 4), (4, 8)])
def test_counting_follows_the_general_pattern(n: int, m: int) -> None:
    weight = drawn((6, 16, 3), torch.float32)
    groups = weight.view(torch.int32).reshape(6, 16 // m, m, 3)
    np.testing.assert_array_equal(n_largest(groups, n).reshape(weight.shape).numpy(), expected(weight, n, m))


def test_extremes_rank_by_size() -> None:
    tiny = torch.finfo(torch.float32).smallest_normal / 4
    weight = torch.tensor([[tiny, -2 * tiny, 0.0, -0.0, 3e38, -3.1e38, 3.2e38, tiny]])
    assert magnitude_mask(weight).tolist() == [[True, True, False, False, False, True, True, False]]


def test_a_mask_of_a_transposed_view_is_that_of_its_copy() -> None:
    weight = drawn((16, 8), torch.float32).t()
    assert torch.equal(magnitude_mask(weight), magnitude_mask(weight.contiguous()))
    channels_last = drawn((8, 16, 3, 3), torch.float32).to(memory_format=torch.channels_last)
    assert torch.equal(magnitude_mask(channels_last), magnitude_mask(channels_last.contiguous()))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e8m0fnu, torch.complex64])
def test_formats_without_a_sign_and_magnitude_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(InputError, match=f"weight dtype {dtype} is not a floating format, expected fp64, fp32, fp16, bf16 or fp8"):
        magnitude_mask(torch.ones(4, 4, dtype=torch.float32).to(dtype))


def test_4096_by_4096_takes_at_most_50_ms_on_two_cores() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn):
        weight = torch.randn(4096, 4096).to(dtype)
        magnitude_mask(weight[:512])
        seconds = []
        for _ in range(5):
            start = time.process_time()
            magnitude_mask(weight)
            seconds.append(time.process_time() - start)
        # Time of all threads, the least of five: what else runs on the machine is not what is measured.
        assert min(seconds) <= 2 * 0.050, (dtype, seconds)


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4", "2:4 transposable"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gpu_chooses_the_same_bits(dtype: torch.dtype, pattern: str) -> None:
    for shape in [(64, 64), (64, 64, 3), (16, 32, 3, 3)]:
        # Few distinct values, so that ties are common.
        weight = (drawn(shape, torch.float32) * 4).round().div(4).to(dtype)
        on_gpu = pattern_mask(weight.cuda(), Pattern.parse(pattern))
        assert on_gpu.is_cuda
        assert torch.equal(on_gpu.cpu(), pattern_mask(weight, Pattern.parse(pattern)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_4096_by_4096_takes_at_most_1_ms_on_the_gpu(dtype: torch.dtype) -> None:
    weight = torch.randn(4096, 4096, device="cuda").to(dtype)
    magnitude_mask(weight)
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(20):
        magnitude_mask(weight)
    stop.record()
    torch.cuda.synchronize()
    assert start.elapsed_time(stop) / 20 <= 1.0


def test_the_device_path_of_transposable_equals_the_host_path(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = drawn((16, 24, 3), torch.float32)
    on_host = transposable_mask(weight)
    seen = []

    class Elsewhere:
        type = "elsewhere"

    # The branch is chosen by the device's type alone; the operations after it are the same on every device.
    class OnDevice(torch.Tensor):
        @property
        def device(self) -> object:  # type: ignore[override]
            seen.append(True)
            return Elsewhere() if len(seen) == 1 else torch.device("cpu")

    assert torch.equal(transposable_mask(weight.as_subclass(OnDevice)).as_subclass(torch.Tensor), on_host)
    assert seen
