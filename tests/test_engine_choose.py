"""Which way wins, what is remembered and what is refused, with a bench that says any time a test wants."""

import importlib
import json
import pkgutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from graphs import network

from twofour.builder import gpu, measure_gain, tactics
from twofour.builder.lower import LayerCall
from twofour.builder.tactics import chosen
from twofour.builder.tactics.bench import Timed
from twofour.builder.tactics.chosen import choose_all
from twofour.builder.tactics.untrusted import Outcome, Trial
from twofour.builder.tactics.ways import Way, bias_for, ways_of, weight_for
from twofour.cli.group import twofour as command_line
from twofour.errors import InputError, TwofourError, UnsupportedError
from twofour.jit import cache as jit_cache
from twofour.kernels.conv import contract as conv
from twofour.kernels.conv.cudnn import BY_GROUP
from twofour.kernels.gemm import contract as gemm
from twofour.pattern import select
from twofour.pattern.pack_sm90 import PackedWeight, unpack
from twofour.timing.gpu import Figure

Speed = Callable[[Way], float | None]


class FakeBench:
    """Times by rule; None: the way cannot run."""

    def __init__(self, speed: Speed, gpu: str = "GPU A") -> None:
        self.speed, self.asked = speed, 0
        self.watch = SimpleNamespace(meter=SimpleNamespace(machine=lambda: {"gpu": gpu}))

    def time(self, ways: Sequence[Way], weight_of: Any = None) -> list[Timed]:
        self.asked += 1
        found = [(way, self.speed(way)) for way in ways]
        return [Timed(way, None, "it fails here") if us is None else Timed(way, Figure(us, 0.01, 9)) for way, us in found]


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> list[Trial]:
    """The GPU's size is known, kernels are not compiled, and cuDNN's first plan of everything runs."""
    tried: list[Trial] = []

    def try_plans(trials: Sequence[Trial], device: int) -> list[Outcome]:
        tried.extend(trials)
        return [Outcome({0: 5.0, 1: 6.0}, {2: "it ended its process"}) for _ in trials]

    monkeypatch.setattr(chosen, "num_sms", lambda device: 132)
    monkeypatch.setattr(chosen, "fill_cache", lambda sources: len(list(sources)))
    monkeypatch.setattr(chosen, "try_plans", try_plans)
    return tried


def linear(*, pruned: bool = True, name: str = "fc", outputs: int = 256, activation: str = "relu") -> LayerCall:
    weight = np.random.default_rng(0).standard_normal((outputs, 512)).astype(np.float32)
    if pruned:
        weight = np.where(select(weight), weight, 0)
    problem = gemm.Problem(64, outputs, 512, "fp16", "fp16", False, gemm.Epilogue(activation, bias=True))
    why = "" if pruned else "the weight is not 2:4: 3 % of its groups of four have two zeros or more"
    return LayerCall(name, "Linear", "gemm", problem, {"x": "x", "d": "y"}, weight, np.ones(outputs, np.float32), True, pruned, why)


def convolution() -> LayerCall:
    problem = conv.Problem(2, 8, 8, 64, 64, (3, 3), pads=(1, 1, 1, 1))
    return LayerCall(
        "conv", "Conv", "conv", problem, {"x": "x", "d": "y"}, np.ones((64, 3, 3, 64), np.float32), None, why_not_24="no kernel"
    )


def run(bench: FakeBench, *calls: LayerCall, **options: Any) -> Any:
    return choose_all(calls, bench=bench, **options)  # type: ignore[arg-type]


def test_the_fastest_wins_and_a_sparse_way_only_if_it_is_faster() -> None:
    sparse_first = run(FakeBench(lambda way: 1.0 if way.is_sparse else 2.0), linear())[0]
    assert sparse_first.way.is_sparse
    assert set(sparse_first.times_us.values()) == {1.0, 2.0}
    dense_first = run(FakeBench(lambda way: 2.0 if way.is_sparse else 1.0), linear())[0]
    assert not dense_first.way.is_sparse
    assert dense_first.us == 1.0


def test_without_2_4_or_with_sparsity_off_no_sparse_way_is_timed() -> None:
    for call, sparsity in ((linear(pruned=False), "auto"), (linear(), "off")):
        found = run(FakeBench(lambda way: 1.0), call, sparsity=sparsity)[0]
        assert not any("2:4" in name for name in found.times_us)
        assert found.left_out["2:4"] == (call.why_not_24 or "sparsity is off")


def test_equal_layers_are_timed_once_and_each_problem_is_tried_once(no_gpu: list[Trial]) -> None:
    bench = FakeBench(lambda way: 1.0)
    chosen = run(bench, linear(), linear(name="again"), convolution(), convolution())
    assert bench.asked == 2
    assert len(chosen) == 4
    assert [trial.library for trial in no_gpu] == ["cusparselt", "cudnn"]
    assert chosen[0].left_out["cusparselt's search"] == "it ended its process"
    assert "cusparselt 0" in chosen[0].times_us
    assert chosen[2].way.library == "cudnn"
    assert chosen[2].left_out["cudnn 2"] == "it ended its process"


def test_wide_groups_are_also_tried_one_by_one(no_gpu: list[Trial]) -> None:
    calls = []
    for inputs, name in ((64, "wide"), (32, "narrow")):
        problem = conv.Problem(2, 8, 8, inputs, inputs, (3, 3), pads=(1, 1, 1, 1), groups=4)
        weight = np.ones((inputs, 3, 3, inputs // 4), np.float32)
        calls.append(LayerCall(name, "Conv", "conv", problem, {"x": "x", "d": "y"}, weight, None, why_not_24="grouped"))
    chosen = run(FakeBench(lambda way: 1.0 if (way.algorithm or 0) & BY_GROUP else 2.0 if way.library == "cudnn" else 3.0), *calls)
    assert [(trial.problem.inputs, trial.form) for trial in no_gpu] == [(64, 0), (64, BY_GROUP), (32, 0)]
    assert [str(c.way) for c in chosen] == ["cudnn 0, group by group", "cudnn 0"]
    assert chosen[0].left_out["cudnn 2, group by group"] == "it ended its process"


def test_choices_are_remembered_for_this_machine_only(tmp_path: Path, no_gpu: list[Trial], caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "timings.json"
    first, second = FakeBench(lambda way: 1.0), FakeBench(lambda way: None)
    before = run(first, linear(), convolution(), cache=path)
    after = run(second, linear(), convolution(), cache=path)
    assert (first.asked, second.asked, len(no_gpu)) == (2, 0, 2)
    assert [str(c.way) for c in before] == [str(c.way) for c in after]
    other = FakeBench(lambda way: 1.0, gpu="GPU B")
    run(other, linear(), cache=path)
    assert other.asked == 1
    assert "was made on another machine or by other versions and is measured anew" in caplog.text


def test_two_builds_with_one_cache_keep_what_both_found(tmp_path: Path) -> None:
    cache = tmp_path / "timings.json"

    def another_build(way: Way) -> float:
        if not cache_has(1):
            run(FakeBench(lambda way: 1.0), linear(outputs=512), cache=cache)
        return 1.0

    def cache_has(entries: int) -> bool:
        return len(json.loads(cache.read_text())["entries"]) >= entries

    run(FakeBench(another_build), linear(), cache=cache)  # type: ignore[arg-type]
    assert cache_has(2)
    bench = FakeBench(lambda way: 1.0)
    run(bench, linear(), linear(outputs=512), cache=cache)
    assert bench.asked == 0


def test_a_damaged_choice_is_measured_anew_and_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "timings.json"
    run(FakeBench(lambda way: 1.0), linear(), cache=path)
    stored = json.loads(path.read_text())
    for entry in stored["entries"].values():
        entry["way"]["library"] = "unknown"
    path.write_text(json.dumps(stored))
    bench = FakeBench(lambda way: 1.0)
    run(bench, linear(), cache=path)
    assert bench.asked == 1
    for text in ("no json", json.dumps({"kind": "report"}), json.dumps([])):
        path.write_text(text)
        with pytest.raises(InputError, match=r"timing cache .* cannot be read .*, expected one that twofour build wrote; move it away"):
            run(bench, linear(), cache=path)
        assert path.read_text() == text


def test_layers_that_nothing_computes_are_all_named() -> None:
    with pytest.raises(
        UnsupportedError, match=r"2 layers cannot be computed with tactics 'all': fc \(.*it fails here.*wide \(.*it fails here"
    ):
        run(FakeBench(lambda way: None), linear(), linear(name="wide", outputs=512))


def test_only_our_kernels_are_timed_where_that_is_asked(no_gpu: list[Trial]) -> None:
    found = run(FakeBench(lambda way: 1.0), linear(), tactics="ours")[0]
    assert all(name.startswith("twofour") for name in found.times_us)
    with pytest.raises(UnsupportedError, match=r"1 layer cannot be computed with tactics 'ours': conv"):
        run(FakeBench(lambda way: 1.0), convolution(), tactics="ours")
    assert not no_gpu


def test_cudnn_that_cannot_start_leaves_the_other_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(trials: Sequence[Trial], device: int) -> list[Outcome]:
        raise TwofourError("cuDNN is not installed")

    monkeypatch.setattr(chosen, "try_plans", fails)
    with pytest.raises(UnsupportedError, match=r"conv \(.*cuDNN is not installed"):
        run(FakeBench(lambda way: 1.0), convolution())


def test_an_activation_that_a_library_lacks_follows_its_product(tmp_path: Path, no_gpu: list[Trial]) -> None:
    call = linear(activation="gelu")
    ways, left = ways_of(call)
    apart = {way.library for way in ways if way.after is not None}
    assert apart == {"twofour", "cublaslt"}
    assert all(way.problem.epilogue == gemm.Epilogue("none", bias=True) for way in ways if way.after is not None)
    assert "cublaslt" not in left
    path = tmp_path / "timings.json"
    chosen = run(FakeBench(lambda way: 1.0 if way.after is not None and way.library == "cusparselt" else 2.0), call, cache=path)[0]
    assert str(chosen.way) == "cusparselt 0, activation apart"
    assert no_gpu[0].problem.epilogue.activation == "none"
    again = run(FakeBench(lambda way: None), call, cache=path)[0]
    assert again.way == chosen.way
    assert not [way for way in ways_of(linear(activation="relu"))[0] if way.after is not None]


def test_weights_and_biases_are_in_the_form_each_way_reads() -> None:
    call = linear()
    assert call.weight is not None
    exact = call.weight.astype(np.float16)
    for way in ways_of(call)[0]:
        weight, bias = weight_for(call, way), bias_for(call, way)
        assert bias is not None
        p = way.problem
        if way.library == "twofour":
            data = weight.view(np.int16).reshape(p.row_blocks, p.k_blocks, -1)
            weight = unpack(PackedWeight(data, p.weight_rows, p.inputs, p.dtype, p.sparse)).view(np.float16)
            assert bias.dtype == np.float32
        else:
            assert bias.dtype == np.float16
        assert np.array_equal(weight, exact)


def test_a_cache_is_filled_by_several_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWOFOUR_CACHE_DIR", str(tmp_path))
    sources = [jit_cache.Source(name, f'extern "C" __global__ void {name}(float* x) {{ x[0] = 1.0f; }}\n') for name in ("one", "two")]
    broken = jit_cache.Source("three", "no program\n")
    assert jit_cache.fill_cache([*sources, *sources, broken], jobs=2) == 3
    assert [jit_cache.default_cache().has(s) for s in (*sources, broken)] == [True, True, False]
    assert jit_cache.fill_cache(sources) == 0


def test_a_cache_is_filled_by_no_more_processes_than_cores_are_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWOFOUR_CACHE_DIR", str(tmp_path))
    filled: list[list[str]] = []
    monkeypatch.setattr(jit_cache, "_fill_apart", lambda sources: filled.append([source.name for source in sources]))
    monkeypatch.setattr(jit_cache.os, "sched_getaffinity", lambda _: {3, 5}, raising=False)
    jit_cache.fill_cache([jit_cache.Source(name, f"{name}\n") for name in ("one", "two", "three", "four")])
    assert sorted(filled) == [["one", "three"], ["two", "four"]]


def test_a_gain_is_measured_on_a_pruned_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "require_gpu", lambda device=0: (9, 0))
    monkeypatch.setattr(gpu, "Bench", lambda watch, device: FakeBench(lambda way: 1.0 if way.is_sparse else 2.0, "NVIDIA H200"))
    import twofour.report.gpu  # noqa: F401 - what imports the stopwatch must have done so before it is replaced

    monkeypatch.setattr("twofour.timing.gpu.Stopwatch", lambda device: None)
    path = tmp_path / "net.onnx"
    onnx.save(network("resnet"), path)
    before = path.read_bytes()
    (dense, sparse), *rest = measure_gain(path, batches=(2, 8), precision="fp16")
    assert [s.batch for _, s in rest] == [8]
    assert not any(layer.sparse for layer in dense.layers)
    assert [layer.sparse for layer in sparse.layers] == [layer.eligible for layer in sparse.layers]
    assert dense.total_us - sparse.total_us == sum(layer.eligible for layer in sparse.layers)
    assert path.read_bytes() == before
    result = CliRunner().invoke(command_line, ["estimate", str(path), "--batch", "2"], catch_exceptions=False)
    assert "Sums of layers timed one by one here" in result.output
    assert f"{dense.total_us / sparse.total_us:.2f}×" in result.output
    read = json.loads(CliRunner().invoke(command_line, ["estimate", str(path), "--batch", "2", "--json"]).output)
    assert read[0]["kind"] == "measurement"
    predicted = CliRunner().invoke(command_line, ["estimate", str(path), "--batch", "2", "--predict"], catch_exceptions=False)
    assert "A prediction from data-sheet rates, not a measurement" in predicted.output


def test_choosing_a_product_is_a_function_whatever_was_imported_before() -> None:
    # A submodule of the same name would take the function's place in the package once it is imported.
    for module in pkgutil.iter_modules(tactics.__path__, f"{tactics.__name__}."):
        importlib.import_module(module.name)
    assert all(not isinstance(getattr(tactics, name), ModuleType) for name in tactics.__all__)
