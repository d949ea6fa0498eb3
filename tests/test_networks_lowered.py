"""Whole networks: small versions of twelve architectures pass by pass, and lowered, against the oracle."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import FOLDER, imported, network
from lowered_run import check_footprints, run_lowered

from twofour.builder import passes
from twofour.builder.evaluate import evaluate, largest_difference, random_inputs
from twofour.builder.lower import Front, lower
from twofour.kernels.conv import contract as conv

NETWORKS = sorted(path.name.removesuffix(".onnx.gz") for path in FOLDER.glob("*.onnx.gz"))
EPS32, EPS16 = float(np.finfo(np.float32).eps), float(np.finfo(np.float16).eps)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_pass_keeps_a_networks_outputs(name: str) -> None:
    model = imported(network(name))
    feeds = random_inputs(model)
    wanted = evaluate(model, feeds)
    assert all(np.isfinite(y).all() and np.abs(y).max() > 0.01 for y in wanted.values()), "the activations are dead"
    for step in passes.pipeline("fp16"):
        step(model)
        # Up to here constants are fp32, folded by float64 arithmetic and rounded once; Precision rounds some to fp16.
        tolerance = 4 * EPS16 if step.name == "Precision" else 64 * EPS32
        difference = largest_difference(wanted, evaluate(model, feeds))
        assert difference <= tolerance, f"{step.name} changed the outputs by {difference}"
    wanted = evaluate(model, feeds)
    lowered = lower(model, 2, "fp16")
    check_footprints(lowered)
    got = run_lowered(lowered, feeds)
    assert largest_difference(wanted, got) <= 1e-11
    assert not [node.op_type for node in model.graph if node.domain != "twofour"]


@pytest.mark.parametrize(
    ("name", "family", "most"), [("resnet", "pointwise", 2), ("convnext", "pointwise", 2), ("mobilenet_v2", "pointwise", 3)]
)
def test_nothing_is_left_beside_the_layers(name: str, family: str, most: int) -> None:
    model = imported(network(name))
    lowered = lower(passes.prepare(model, "fp16"), 2, "fp16")
    # Filling and copying the padded image, and for ten classes, which 8 does not divide, copying them out.
    assert sum(call.family == family for call in lowered.calls) <= most + 1


def test_vision_transformers_become_attention_on_views_of_one_projection() -> None:
    for name in ("vit", "timm_vit"):
        lowered = lower(passes.prepare(imported(network(name)), "bf16"), 2, "bf16")
        assert [call.family for call in lowered.calls].count("attention") == 2
    lowered = lower(passes.prepare(imported(network("vit")), "bf16"), 2, "bf16")
    calls = [call for call in lowered.calls if call.family == "attention"]
    assert all(call.problem.q_strides == (17 * 96, 8, 96, 1) and call.problem.dtype == "bf16" for call in calls)


def test_a_dense_block_copies_nothing() -> None:
    lowered = lower(passes.prepare(imported(network("densenet")), "fp16"), 2, "fp16")
    inside = [call for call in lowered.calls if call.kind == "Concat"]
    # The first block is aligned and in place; in the second, after 20 channels, parts are copied.
    assert all(
        lowered.places[call.operands["d"]].shape[-1] in (20, 8) and lowered.places[call.operands["d"]].shape[1] == 4 for call in inside
    )
    strided = [call for call in lowered.calls if call.family == "conv" and call.problem.y_pitch]
    assert {call.problem.y_pitch for call in strided} == {40}


def test_layers_say_why_they_cannot_run_sparse(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(network("resnet"), path)
    lowered = Front(path).lower(3, "fp16")
    layers = [call for call in lowered.calls if call.weight is not None]
    reasons = {call.why_not_24 for call in layers}
    assert any(reason.startswith("the weight is not 2:4: ") for reason in reasons)
    assert "grouped convolution (2 groups)" in reasons
    assert "an image of 3 channels has no groups of four" in reasons
    assert "no 2:4 kernel here computes a 1×1 convolution of stride 2" in reasons
    eligible = [call for call in layers if call.eligible and call.family == "conv"]
    assert all(conv.as_gemm(call.problem) is not None for call in eligible)
    assert eligible
    assert lowered.batch == 3
    assert layers[0].flops == 2 * 3 * 16 * 16 * 64 * 4 * 4 * 16


def test_another_batch_has_the_same_weights(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(network("mobilenet_v2"), path)
    front = Front(path)
    one, many = front.lower(1, "fp16"), front.lower(7, "fp16")
    assert [call.name for call in one.calls] == [call.name for call in many.calls]
    for a, b in zip(one.calls, many.calls, strict=True):
        assert (a.weight is None and b.weight is None) or np.array_equal(a.weight, b.weight)
    assert many.calls[2].problem.batch == 7
