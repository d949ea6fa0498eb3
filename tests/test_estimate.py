"""Predictions without a GPU: labelled as such, their error recomputed from the recorded measurements, each layer with its reason."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from graphs import network, text_model
from script_loader import load_script

import twofour
from twofour.builder.estimate import (
    H200_ERROR,
    NETWORKS_ERROR,
    estimate,
    estimate_layer,
    measured_error,
    networks_error,
    product_us,
)
from twofour.builder.gpus import GPUS, gpu_named
from twofour.builder.lower import LayerCall
from twofour.cli.group import twofour as command_line
from twofour.errors import InputError, UnsupportedError
from twofour.kernels.conv import contract as conv

RESULTS = Path(__file__).parent.parent / "results"
MEASURED, ENGINE = RESULTS / "nvidia-h200" / "gemm.json", RESULTS / "nvidia-h200" / "engine.json"


@pytest.fixture(scope="module")
def linear(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("estimate") / "linear.onnx"
    weight = np.random.default_rng(0).standard_normal((4096, 4096)).astype(np.float32)
    onnx.save(text_model("float[N,4096] x", "a = MatMul(x, w) y = Relu(a)", w=weight), path)
    return path


def test_the_stated_error_is_that_of_the_recorded_measurements() -> None:
    rows = json.loads(MEASURED.read_text())["rows"]
    for kind, stated in H200_ERROR.items():
        found = measured_error(rows, GPUS["H200"], sparse=kind == "2:4")
        # Whole percents are printed; kernels timed anew may move them by one.
        assert (found.median, found.p90) == pytest.approx((stated.median, stated.p90), abs=0.01), (kind, found)
        assert found.n == stated.n
        assert found.median < 0.1


def test_the_stated_error_of_whole_networks_is_that_of_the_record() -> None:
    rows = json.loads((RESULTS / "cpu" / "estimate-networks.json").read_text())["rows"]
    assert networks_error(rows) == NETWORKS_ERROR
    assert NETWORKS_ERROR["gain"].median < 0.05
    measured = {(r["net"], r["batch"], r["precision"], r["variant"]): r["ms"] for r in json.loads(ENGINE.read_text())["rows"] if "ms" in r}
    for row in rows:  # of the networks as they run today
        now = [measured[row["net"], row["batch"], row["precision"], variant] for variant in ("off", "2:4")]
        assert row["measured_ms"] == pytest.approx(now, rel=0.05), row["net"]


def test_a_constant_that_made_the_measured_times_is_found_again() -> None:
    script = load_script("estimate_layers", "evidence")
    rows = json.loads((RESULTS / "nvidia-h200" / "conv.json").read_text())["rows"]
    layers = [row for row in rows if row["net"] == "ConvNeXt-B" and row["batch"] == 256]  # bound by arithmetic
    name, values = script.FITS["depthwise"]
    share, h200 = script.estimate.DEPTHWISE_SHARE, GPUS["H200"]
    with script.constant(name, 0.03):
        made = [row | {"ours_dense_us": script.predicted_us(script.conv_rows.problem_of(row), h200), "cudnn_us": 1e9} for row in layers]
    best, error = script.fitted(made, h200, name, values[::2])
    assert best == pytest.approx(0.03, rel=0.03)
    assert error < 0.03 < script.off(made, h200)
    assert share == script.estimate.DEPTHWISE_SHARE
    found = list(script.report(RESULTS / "nvidia-h200" / "conv.json", (64,)))
    assert len(found) == 8, "seven grouped layers and their constant"
    assert found[-1].startswith(f"grouped: LEAST_GROUP = {script.estimate.LEAST_GROUP:g} is off by ")


def conv_us(**different: Any) -> float:
    """Microseconds of a convolution of 3×3 over 128 channels that differs in something."""
    usual = {"batch": 64, "height": 56, "width": 56, "inputs": 128, "outputs": 128, "kernel": (3, 3), "pads": (1, 1, 1, 1)}
    p = conv.Problem(**usual | different)
    return estimate_layer(LayerCall("c", "Conv", "conv", p, {}, flops=p.flops, num_bytes=p.num_bytes), GPUS["H200"]).dense_us


def test_what_libraries_are_slow_at_is_predicted_so() -> None:
    assert conv_us(outputs=64) == pytest.approx(conv_us(), rel=0.05)  # half of a tile's columns does nothing
    assert conv_us(inputs=16) > 0.9 * conv_us(inputs=32)
    assert conv_us(groups=16) > 0.4 * conv_us()  # though it is a sixteenth of the work
    assert conv_us(groups=128) > 2 * conv_us(kernel=(1, 1), pads=(0, 0, 0, 0), inputs=8, outputs=128)
    assert conv_us(height=112, width=112, strides=(2, 2)) > 1.4 * conv_us()
    assert conv_us(epilogue=conv.Epilogue("gelu")) > conv_us(epilogue=conv.Epilogue("relu")) + 3.0


def test_peak_rates_are_twice_as_high_sparse_and_have_a_source() -> None:
    assert list(GPUS) == ["A100", "A30", "L4", "L40S", "RTX 4090", "H100", "H200", "B200"]
    for gpu in GPUS.values():
        assert gpu.sparse_tflops == pytest.approx(2 * gpu.dense_tflops, rel=0.02)
        assert "NVIDIA" in gpu.source


def test_a_gpu_is_found_by_any_spelling() -> None:
    assert gpu_named("NVIDIA GeForce rtx4090") is GPUS["RTX 4090"]
    with pytest.raises(InputError, match=r"GPU 'H20O' is not in the table, expected one of A100, .*; did you mean 'H200'"):
        gpu_named("H20O")


def test_a_large_product_is_bound_by_arithmetic_and_a_small_one_by_memory_or_its_launch() -> None:
    h200 = GPUS["H200"]
    large, bound = product_us(h200, 8192, 8192, 8192, sparse=False)
    assert bound == "arithmetic"
    assert large == pytest.approx(3 + 2 * 8192**3 / (0.69 * 989.4e6))
    assert product_us(h200, 16, 28672, 4096, sparse=False)[1] == "memory"
    assert product_us(h200, 16, 64, 64, sparse=False)[1] == "launch"
    # Weights are read once, at nine sixteenths of their dense size.
    dense, sparse = (product_us(h200, 16, 28672, 4096, sparse=s)[0] for s in (False, True))
    assert (dense - sparse) * 0.9 * 4.8e6 == pytest.approx(28672 * 4096 * 0.875, rel=1e-6)


def test_a_network_of_large_products_gains_and_says_it_is_a_prediction(linear: Path) -> None:
    (one,) = twofour.estimate(linear, gpus=["H200"], batch=[8192])
    assert str(one).startswith("prediction for H200, batch 8192, fp16: dense ")
    assert str(one).endswith("(not measured)")
    assert 1.3 < one.dense_us / one.sparse_us < 1.5
    data = one.to_json()
    assert data["kind"] == "prediction"
    assert data["error_on_h200"]["products"]["2:4"]["n"] == 41
    assert data["error_on_h200"]["networks"]["gain"]["n"] == NETWORKS_ERROR["gain"].n
    assert data["source"] == GPUS["H200"].source


def test_every_layer_of_a_network_has_a_time_and_a_reason(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(network("regnet"), path)
    predictions = estimate(path, gpus=["A100", "L4"], batch=(1, 64))
    assert [(p.gpu, p.batch) for p in predictions] == [("A100", 1), ("A100", 64), ("L4", 1), ("L4", 64)]
    for prediction in predictions:
        assert all(layer.dense_us >= 3 for layer in prediction.layers)
        assert prediction.sparse_us <= prediction.dense_us
        for layer in prediction.layers:
            weighted = layer.family in ("conv", "gemm")
            assert bool(layer.why_not) == (weighted and (layer.sparse_us is None or layer.sparse_us >= 0.98 * layer.dense_us))
    assert predictions[2].dense_us > predictions[0].dense_us


def test_the_function_and_the_command_predict_the_same_by_default(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(text_model("float[N,64] x", "y = MatMul(x, w)", w=np.ones((64, 64), np.float32)), path)
    printed = CliRunner().invoke(command_line, ["estimate", str(path), "--gpu", "H200", "--predict", "--json"])
    assert json.loads(printed.output) == [one.to_json() for one in estimate(path, gpus="H200")]


def test_one_name_is_one_gpu(linear: Path) -> None:
    assert [one.gpu for one in estimate(linear, gpus="h200", batch=1)] == ["H200"]
    with pytest.raises(InputError, match="GPU '' is not in the table, expected one of A100"):
        estimate(linear, gpus="")


def test_no_batch_is_refused(linear: Path) -> None:
    with pytest.raises(InputError, match="no batch size is given, expected at least one"):
        estimate(linear, batch=())


def test_the_command_prints_tables_and_json(linear: Path) -> None:
    table = CliRunner().invoke(command_line, ["estimate", str(linear), "--gpu", "H200", "--batch", "8192"], env={"COLUMNS": "200"})
    assert table.exit_code == 0, table.output
    assert "A prediction from data-sheet rates, not a measurement." in table.output
    assert "8192×4096 → 4096" in table.output
    error = NETWORKS_ERROR["dense"]
    said = f"On an H200, of {error.n} whole networks: a dense pass is off by {100 * error.median:.0f} % (median)"
    assert said in table.output.replace("\n", " ")
    printed = CliRunner().invoke(command_line, ["estimate", str(linear), "--batch", "64", "--json"])
    assert [row["gpu"] for row in json.loads(printed.output)] == list(GPUS)


def test_what_a_fallback_leaves_out_of_the_sum_is_said(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(text_model("float[N,64] x", "a = Softsign(x) y = MatMul(a, w)", w=np.ones((64, 64), np.float32)), path)
    table = CliRunner().invoke(command_line, ["estimate", str(path), "--fallback"], env={"COLUMNS": "200"})
    assert "Not in these times: Softsign_0, which ONNX Runtime would compute on the CPU." in table.output


def test_a_network_without_a_layer_of_ours_is_not_predicted(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(text_model("float[N,64] x", "y = Softsign(x)"), path)
    with pytest.raises(UnsupportedError, match=r"has none of the operators of .*, expected one; run it with ONNX Runtime"):
        estimate(path, fallback=True)


@pytest.mark.parametrize("batch", ["0", "2147483648", "99999999999999999999"])
def test_a_batch_that_no_array_can_have_is_refused(linear: Path, batch: str) -> None:
    with pytest.raises(InputError, match=f"batch is {batch}, expected 1 to 2147483647"):
        estimate(linear, batch=[int(batch)])
