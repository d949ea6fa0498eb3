"""Engines on two GPUs of one process (`pytest -m gpu`)."""

import gc
import threading
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from graphs import network
from plan_samples import CHANNELS, SIDE, expected, plan

import twofour
from twofour.builder.build import build
from twofour.errors import InputError

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]

CALLS = 50


def images(items: int, device: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(items).standard_normal((items, CHANNELS, SIDE, SIDE)).astype(np.float32)).to(
        f"cuda:{device}"
    )


def test_threads_call_engines_on_both_at_once() -> None:
    engines = [twofour.load(plan(), device=device) for device in (0, 1)]
    failures: list[str] = []

    def work(device: int) -> None:
        for count in range(CALLS):
            x = images(1 + count % 5, device)
            y = engines[device](x)
            wanted = expected(x.cpu().numpy())
            if y.device != x.device or np.abs(y.cpu().numpy() - wanted).max() > 20 * 2.0**-24 * np.abs(wanted).max():
                failures.append(f"GPU {device}, call {count}")

    threads = [threading.Thread(target=work, args=(device,)) for device in (0, 1, 0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("name", ["resnet", "vit"])  # convolutions and attention by cuDNN, products by ours or a library
def test_a_plan_built_on_one_runs_on_the_other_to_the_bit(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(network(name), path)
    made = build(path, batch=(2,), precision="fp16", device="cuda", timing_cache=tmp_path / "timings.json")
    shape = tuple(2 if size is None else size for size in made.inputs[0].shape)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    first, second = (twofour.load(made, device=device)(x.to(f"cuda:{device}")) for device in (0, 1))
    assert (first.device.index, second.device.index) == (0, 1)
    assert torch.equal(first.cpu(), second.cpu())
    assert first.isfinite().all()
    assert first.any()


def test_the_callers_gpu_stays_current() -> None:
    with torch.cuda.device(0):
        engine = twofour.load(plan(), device=1)
        y = engine(images(4, 1))
        assert (torch.cuda.current_device(), torch.ones(1, device="cuda").device.index) == (0, 0)
        del engine, y
        gc.collect()
        assert torch.cuda.current_device() == 0


def test_memory_of_the_other_gpu_is_one_sentence() -> None:
    with pytest.raises(InputError, match=r"engine: input 'x' is on GPU 0, expected GPU 1; move it there"):
        twofour.load(plan(), device=1)(images(4, 0))
