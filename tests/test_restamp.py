"""Recorded results are stamped where every kernel they may have run is the same machine code from other sources, and only there."""

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import onnx
import onnx.parser
import pytest
from graphs import network
from script_loader import ROOT, load_script

from twofour.builder.assemble import forced
from twofour.builder.lower import Front
from twofour.builder.tactics import chosen
from twofour.builder.tactics.bench import Timed
from twofour.builder.tactics.untrusted import Outcome
from twofour.builder.tactics.ways import Way
from twofour.jit.source import Source
from twofour.kernels import families
from twofour.kernels.gemm import contract as gemm
from twofour.kernels.launchable import kernel_source, sources_digests
from twofour.timing.gpu import Figure

POOL = Path("twofour") / "kernels" / "pool" / "pool.cuh"
# Networks of the names that results know, each of one layer.
AVERAGE, LARGEST = "ResNet-50", "DenseNet-121"
LAYERS = {"torchvision-resnet50": "AveragePool", "torchvision-densenet121": "MaxPool"}


@pytest.fixture(scope="module")
def restamp() -> ModuleType:
    return load_script("restamp")


def row(net: str, variant: str, sources: dict[str, str], **facts: Any) -> dict[str, Any]:
    return {"net": net, "batch": 256, "precision": "fp16", "variant": variant, "sources": sources, **facts}


def written(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text(json.dumps({"schema": 1, "kind": "engine", "machine": {"gpu": "NVIDIA H200"}, "rows": rows}, indent=1) + "\n")
    return path


def test_only_rows_of_unchanged_kernels_of_the_old_sources_are_stamped(
    restamp: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    src, work, cache = (tmp_path / name for name in ("src", "networks", "codes"))
    shutil.copytree(ROOT / "src", src, ignore=shutil.ignore_patterns("__pycache__"))
    # Another digest of the family, another code only where the largest value is taken.
    text, changed = (src / POOL).read_text(), "y[i] = kMax ? -infinity() : 0.0f"
    assert text.count(changed) == 1
    (src / POOL).write_text(text.replace(changed, "y[i] = kMax ? -1.0f : 0.0f"))
    for folder, layer in LAYERS.items():
        (work / folder).mkdir(parents=True)
        graph = f"pools (float[n, 8, 16, 16] x) => (float[n, 8, 8, 8] y) {{ y = {layer} <kernel_shape=[2, 2], strides=[2, 2]> (x) }}"
        model = onnx.helper.make_model(onnx.parser.parse_graph(graph), opset_imports=[onnx.helper.make_opsetid("", 21)])
        for stem in ("dense", "sparse"):
            onnx.save(model, work / folder / f"{stem}.onnx")
    calls = Front(work / "torchvision-resnet50" / "dense.onnx").lower(256, "fp16").calls
    layers = len(calls)
    before, other = sources_digests(), {"gemm": "0" * 16}
    rows = [
        row(AVERAGE, "torch.compile", other),
        row(AVERAGE, "off", before, layers=layers, layers_eligible=0),
        row(AVERAGE, "off", other),
        row(AVERAGE, "2:4", before, layers=layers + 1),
        row(LARGEST, "2:4", before),
    ]
    results = written(tmp_path / "engine.json", rows)
    words = [ROOT / "src", results, "--src", src, "--work", work, "--cache", cache, "--jobs", 1]
    assert restamp.main(list(map(str, words))) == 1
    after = restamp.Tree(src).ask("digests")
    assert {name for name in before if before[name] != after[name]} == {"pool", "resize"}
    assert [one["sources"] for one in json.loads(results.read_text())["rows"]] == [other, after, other, before, before]
    said = capsys.readouterr().out
    assert f"{len(list(cache.iterdir()))} texts are to be compiled" in said
    assert "ResNet-50 batch 256 fp16, off: of sources that are neither the old nor the present ones" in said
    assert f"fp16, 2:4: torchvision-resnet50 batch 256 fp16 2:4 has {layers} layers, the row {layers + 1}" in said
    assert re.search(
        r"^DenseNet-121 batch 256 fp16, 2:4: \d+ kernels differ\n    pool \(vector 8.*kind max.*: other machine code$", said, re.M
    )
    assert "1 of 4 are of the present sources" in said

    cases = [case for call in calls for case in load_script("same_code").cases_of(call, False, 132) if case[0] == "pool"]
    lines: list[str] = []
    trees = restamp.Tree(ROOT / "src"), restamp.Tree(src)
    assert cases
    assert restamp.changed(*trees, cases, sms=132, folder=cache, jobs=1, say=lines.append) == {}
    assert len(lines) == 1
    assert lines[0].endswith("have another text, 0 texts are to be compiled"), "what was compiled is kept"

    written(results, [row(AVERAGE, "off", after)])
    assert restamp.main(list(map(str, words))) == 0


@pytest.mark.parametrize("sparse", [False, True])
def test_the_listed_kernels_contain_those_that_a_build_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sparse: bool) -> None:
    onnx.save(network("resnet"), tmp_path / "resnet.onnx")
    lowered = Front(tmp_path / "resnet.onnx").lower(256, "fp16")
    asked: list[Source] = []
    monkeypatch.setattr(chosen, "num_sms", lambda device: 132)
    monkeypatch.setattr(chosen, "fill_cache", lambda sources: asked.extend(sources))
    monkeypatch.setattr(chosen, "try_plans", lambda trials, device: [Outcome({0: 5.0}) for _ in trials])

    class AnyTime:
        """A bench on which every way takes as long, and that keeps our kernels' sources."""

        watch = SimpleNamespace(meter=SimpleNamespace(machine=lambda: {"gpu": "GPU A"}))

        def time(self, ways: Sequence[Way], weight_of: Any = None) -> list[Timed]:
            return [Timed(way, Figure(1.0, 0.01, 9)) for way in ways]

    calls = [forced(call) if sparse else call for call in lowered.calls]
    chosen.choose_all(calls, sparsity="auto" if sparse else "off", bench=AnyTime())
    same_code = load_script("same_code")
    cases = [case for call in lowered.calls for case in same_code.cases_of(call, sparse, 132)]
    found = {same_code.source_of(case, 132) for case in json.loads(json.dumps(cases))}
    assert len(asked) > 20
    assert set(asked) <= found
    assert any(case[0] == "gemm" and case[1]["sparse"] for case in cases) == sparse
    assert {case[0] for case in cases} >= {"gemm", "grouped", "pool", "patches"}


def test_a_row_of_products_names_its_kernels_and_is_stamped_with_its_family(restamp: ModuleType) -> None:
    tactics = {"ours": "twofour:2:4:256x64x5:split", "ours_dense": "twofour:dense:128x192x5x2", "cublas": "cublaslt:0", "cusparselt": None}
    row = {"name": "a", "dtype": "fp16", "tactics": tactics, "sources_digest": "b", "versions": {"ours": "b", "ours_dense": "a"}}
    (claim,) = restamp.gemm_claims({"rows": [row]})
    same_code = load_script("same_code")
    wanted = [(True, gemm.Config("tuned", 256, 64, 5)), (False, gemm.Config("tuned", 128, 192, 5, buffers=2))]
    problem = gemm.Problem(128, 128, 128, dtype="fp16", out_dtype="fp16")
    expected = [kernel_source("gemm", replace(problem, sparse=sparse), config, 132) for sparse, config in wanted]
    assert [same_code.source_of(case, 132) for case in claim.cases] == expected
    assert claim.is_of({"gemm": "b", "pool": "c"})
    assert not claim.is_of({"gemm": "c"})
    claim.stamp({"gemm": "d", "pool": "c"})
    assert (row["sources_digest"], row["versions"]) == ("d", {"ours": "d", "ours_dense": "a"})


def test_a_row_of_a_layer_names_the_kernels_that_ran(restamp: ModuleType) -> None:
    recorded = json.loads((ROOT / "results" / "nvidia-h200" / "conv.json").read_text(encoding="utf-8"))["rows"]
    same_code, seen = load_script("same_code"), set()
    for row, claim in zip(recorded, restamp.conv_claims({"rows": recorded}), strict=True):
        ours = {way for way in row["times_us"] if way.startswith("twofour ")}
        configs = [families.read_config(case[0], case[2], "config") for case in claim.cases]
        problems = [families.read_problem(case[0], case[1], "problem") for case in claim.cases]
        named = {str(Way(row["family"], "twofour", p, config)) for p, config in zip(problems, configs, strict=True)}
        assert ours
        assert named == ours
        seen |= {json.dumps(case) for case in claim.cases[:1]}
    assert all(same_code.source_of(json.loads(case), 132).text for case in sorted(seen)[:4])


@pytest.mark.parametrize("name", ["gemm", "conv", "engine", "engine-agreement", "engine-soak"])
def test_recorded_files_are_read_and_written_in_their_form(restamp: ModuleType, name: str, tmp_path: Path) -> None:
    path = tmp_path / f"{name}.json"
    shutil.copy(ROOT / "results" / "nvidia-h200" / path.name, path)
    text = path.read_text(encoding="utf-8")
    results = restamp.Results.read(path)
    assert results.sms == 132
    assert all(claim.cases or claim.graphs for claim in results.claims)
    results.write()
    assert path.read_text(encoding="utf-8") == text


def test_what_cannot_be_stamped_is_refused_in_a_sentence(restamp: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tests.json"
    for text, wanted in (
        ('{"kind": "tests"}', "holds 'tests' results, expected one of 'gemm', 'conv', 'engine', 'engine agreement', 'engine-soak'"),
        ("[", "is no results file"),
    ):
        path.write_text(text)
        assert restamp.main([str(ROOT / "src"), str(path)]) == 2
        assert wanted in capsys.readouterr().err
    assert restamp.main([str(tmp_path), str(path)]) == 2
    assert "holds no package twofour, expected the src folder of a revision" in capsys.readouterr().err
    results = restamp.Results.read(written(tmp_path / "engine.json", [row(AVERAGE, "off", {})]))
    results.path.write_text("{}")
    with pytest.raises(restamp.InputError, match="was changed by another process"):
        results.write()
    results.record["machine"]["gpu"] = "GPU B"
    with pytest.raises(restamp.InputError, match="was measured on 'GPU B', expected one of A100"):
        _ = results.sms
