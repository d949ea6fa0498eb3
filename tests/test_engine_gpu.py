"""Whole networks through build, plan and runtime on a real GPU, against ONNX Runtime in float32 (`pytest -m gpu`)."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from graphs import network, text_model
from test_engine_assemble import NETWORKS, ROUNDING
from test_import_walls import BLOCKER

import twofour
from twofour.builder import BuildRecord
from twofour.builder.build import build
from twofour.builder.tactics.untrusted import Outcome, Trial, try_plans
from twofour.errors import UnsupportedError
from twofour.report.measure import batches_of

pytestmark = pytest.mark.gpu

CACHE = "timings.json"
SIZES = [(1, 1), (2, 3), (7, 5), (31, 33), (224, 223), (513, 257)]


FEW_PLANS = 2


@pytest.fixture
def few_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each library the first plans only: making one takes a core up to a second, and which is fastest is not asked here."""

    def tried(trials: Sequence[Trial], device: int = 0) -> list[Outcome]:
        return try_plans([replace(trial, most=min(trial.most, FEW_PLANS)) for trial in trials], device)

    monkeypatch.setattr("twofour.builder.tactics.chosen.try_plans", tried)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache") / CACHE


def check(path: Path, batches: tuple[int, ...], items: tuple[int, ...], precision: str, cache: Path, **options: Any) -> Any:
    """The engine of a file gives what ONNX Runtime gives, for any number of items; return the plan."""
    plan = build(path, batch=batches, precision=precision, device="cuda", timing_cache=cache, **options)
    plan.save(path.with_suffix(".plan"))
    engine = twofour.load(path.with_suffix(".plan"))
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    layers = sum(bool(layer["flops"]) for layer in plan.about["builds"][0]["layers"])
    for count in items:
        shape = tuple(count if size is None else size for size in plan.inputs[0].shape)
        x = np.random.default_rng(count).standard_normal(shape).astype(np.float32)
        wanted = np.concatenate([session.run(None, {session.get_inputs()[0].name: x[i : i + 1]})[0] for i in range(count)])
        # Every layer rounds its result once; the errors of L layers add as square roots, and a network amplifies some of them.
        limit = 8 * ROUNDING[precision] * np.sqrt(layers) * np.abs(wanted).max()
        assert np.abs(np.asarray(engine(x)) - wanted).max() <= limit
    return plan


@pytest.mark.parametrize(("name", "precision"), [(name, "fp16") for name in NETWORKS] + [("resnet", "bf16"), ("vit", "bf16")])
@pytest.mark.usefixtures("few_plans")
def test_a_network_on_the_gpu_gives_what_onnx_runtime_gives(name: str, precision: str, cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(network(name), path)
    check(path, (2,), (1, 3), precision, cache)


def ragged(height: int, width: int) -> onnx.ModelProto:
    """Convolutions of channels that are no multiples of 8, strided and not, a pool, a shortcut, a classifier."""
    rng = np.random.default_rng(height * 1000 + width)

    def normal(*shape: int) -> Any:
        return (rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)

    body = (
        "a = Conv <pads=[1,1,1,1], strides=[2,2]> (x, w1, b1) b = Relu(a) c = Conv <pads=[1,1,1,1]> (b, w2) "
        "p = MaxPool <kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]> (c) d = Conv(p, w3) e = Add(d, p) f = Relu(e) "
        "g = GlobalAveragePool(f) h = Flatten(g) y = Gemm(h, w4, b4)"
    )
    weights = {"w1": normal(20, 3, 3, 3), "b1": normal(20), "w2": normal(36, 20, 3, 3), "w3": normal(36, 36, 1, 1)}
    weights |= {"w4": normal(36, 10), "b4": normal(10)}
    model = text_model(f"float[N,3,{height},{width}] x", body, "float[N,10] y", **weights)
    return onnx.shape_inference.infer_shapes(model)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.usefixtures("few_plans")
def test_odd_images_and_ragged_channels(size: tuple[int, int], cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(ragged(*size), path)
    check(path, (1, 4), (1, 2, 5, 9), "fp16", cache)


def small_scales() -> onnx.ModelProto:
    """Two layers and one scale a channel from 1e-3 to 1e-7: folded, few weights would keep their digits in fp16."""
    rng = np.random.default_rng(0)
    weights = {name: (0.1 * rng.standard_normal((96, 96))).astype(np.float32) for name in ("w1", "w2")}
    weights |= {"s": np.logspace(-3, -7, 96, dtype=np.float32)}
    return text_model("float[N,96] x", "a = MatMul(x, w1) b = Relu(a) c = MatMul(b, w2) y = Mul(c, s)", "float[N,96] y", **weights)


@pytest.mark.usefixtures("few_plans")
def test_channels_of_small_scales_keep_their_digits(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(onnx.shape_inference.infer_shapes(small_scales()), path)
    check(path, (16,), (16,), "fp16", cache)
    x = np.random.default_rng(0).standard_normal((16, 96)).astype(np.float32)
    (wanted,) = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"]).run(None, {"x": x})
    found = np.asarray(twofour.load(path.with_suffix(".plan"))(x))
    # Two layers round; each channel by its own size.
    assert np.all(np.abs(found - wanted).max(0) <= 8 * ROUNDING["fp16"] * np.sqrt(2) * np.abs(wanted).max(0))


@pytest.mark.usefixtures("few_plans")
def test_threads_that_come_and_go_leave_the_libraries_whole(cache: Path, tmp_path: Path) -> None:
    """A thread's stream is freed with it, while cuDNN's handle, which all threads share, launched on it last."""
    path = tmp_path / "model.onnx"
    onnx.save(network("resnet"), path)
    plan = build(path, batch=(2,), precision="fp16", device="cuda", timing_cache=cache)
    assert "cudnn" in plan.needs
    engine = twofour.load(plan)
    (x,) = engine.random_inputs(2)
    wanted, found = np.asarray(engine(x)), []
    for _ in range(4):
        thread = threading.Thread(target=lambda: found.append(np.asarray(engine(x))))
        thread.start()
        thread.join()
    assert len(found) == 4
    assert all(np.array_equal(y, wanted) for y in found)


def half_network() -> onnx.ModelProto:
    """A product whose file takes, holds and gives fp16."""
    weight = (np.random.default_rng(0).standard_normal((64, 32)) / 8).astype(np.float16)
    return onnx.shape_inference.infer_shapes(text_model("float16[N,64] x", "y = MatMul(x, w)", "float16[N,32] y", w=weight))


@pytest.mark.usefixtures("few_plans")
def test_an_engine_of_a_file_of_halves_takes_and_gives_fp32(cache: Path, tmp_path: Path) -> None:
    path, model = tmp_path / "model.onnx", half_network()
    onnx.save(model, path)
    engine = twofour.load(build(path, batch=(4,), precision="fp16", device="cuda", timing_cache=cache))
    for items in (4, 3, 9):
        x = np.random.default_rng(items).standard_normal((items, 64)).astype(np.float16).astype(np.float32)
        y = np.asarray(engine(x))
        wanted = x.astype(np.float64) @ onnx.numpy_helper.to_array(model.graph.initializer[0])
        assert (y.shape, y.dtype) == ((items, 32), np.float32)
        assert np.abs(y - wanted).max() <= 8 * ROUNDING["fp16"] * np.abs(wanted).max()


@pytest.mark.usefixtures("few_plans")
def test_what_the_cpu_computes_is_in_the_build_report_with_its_copies(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    weight = np.random.default_rng(0).standard_normal((1024, 1024)).astype(np.float32) / 32
    body = "a = Softsign(x) b = MatMul(a, w) c = Relu(b) d = Softsign(c) y = Relu(d)"
    model = text_model("float[N,1024] x", body, "float[N,1024] y", w=weight)
    onnx.save(onnx.shape_inference.infer_shapes(model), path)
    plan = check(path, (2, 4096), (1, 2, 4096), "fp16", cache, fallback=True)
    small, large = (BuildRecord.from_json(json.dumps(data)) for data in plan.about["builds"])
    for record in (small, large):
        hosted = [layer for layer in record.layers if layer.family == "fallback"]
        assert len(hosted) == 2
        assert all(0 < (layer.copy_us or 0) < (layer.us or 0) for layer in hosted)
        assert sum(layer.share or 0 for layer in record.layers) == pytest.approx(1.0)
    # 16 MiB there and 16 MiB back; no link between a host and a GPU is faster than 450 GB/s a direction.
    assert all((layer.copy_us or 0) > 2 * 2**24 / 450e3 for layer in large.layers if layer.family == "fallback")


def test_forced_zeros_are_said_loudly(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(network("mlp_mixer"), path)
    plan = build(path, batch=(2,), precision="fp16", device="cuda", sparsity="force", timing_cache=cache)
    assert "the accuracy of this engine is gone" in plan.about["note"]


@pytest.mark.usefixtures("few_plans")
def test_with_our_tactics_alone_an_engine_needs_only_the_driver(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(network("mlp_mixer"), path)
    plan = check(path, (1, 4), (1, 2, 4, 5), "fp16", cache, tactics="ours")
    assert not plan.needs
    assert {step.library for program in plan.programs for step in program.steps} == {"twofour"}
    # Neither a library of NVIDIA's nor a compiler can be found where the plan runs.
    kept = '{"torch", "onnx", "onnx_ir", "onnxscript"}'
    code = BLOCKER.replace(kept, '{"torch", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "nvmath", "cudnn"}') + (
        f"import numpy as np, twofour\ne = twofour.load({str(path.with_suffix('.plan'))!r})\n"
        f"np.save({str(tmp_path / 'y.npy')!r}, e(np.load({str(tmp_path / 'x.npy')!r})))\n"
    )
    shape = tuple(3 if size is None else size for size in plan.inputs[0].shape)
    x = np.random.default_rng(3).standard_normal(shape).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    environment = {**os.environ, "TWOFOUR_NO_COMPILE": "1", "TWOFOUR_CACHE_DIR": str(tmp_path / "empty")}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    assert np.array_equal(np.load(tmp_path / "y.npy"), np.asarray(twofour.load(plan)(x)))


def test_our_tactics_alone_are_refused_by_name_where_they_do_not_cover_a_network(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(network("resnet"), path)
    with pytest.raises(UnsupportedError, match=r"\d+ layers cannot be computed with tactics 'ours': "):
        build(path, batch=(1,), precision="fp16", device="cuda", tactics="ours", timing_cache=cache)


def test_a_fixed_batch_is_built_without_naming_it(tmp_path: Path) -> None:
    model = text_model("float[4,64] x", "y = MatMul(x, w)", w=2 * np.eye(64, dtype=np.float32))
    model.graph.output[0].type.CopyFrom(model.graph.input[0].type)
    onnx.save(model, tmp_path / "model.onnx")
    plan = build(tmp_path / "model.onnx", device="cuda", tactics="ours")
    assert (plan.batches, batches_of({"plan": plan})) == ((4,), (4,))
    assert np.array_equal(twofour.load(plan)(np.ones((4, 64), np.float32)), np.full((4, 64), 2, np.float32))
