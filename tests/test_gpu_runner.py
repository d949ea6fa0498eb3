"""scripts/gpu.sh without a GPU: its parts name what exists, its schedule keeps its rules, and parts run, stop and go on."""

import os
import re
import shlex
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from script_loader import load_script

ROOT = Path(__file__).parent.parent
FOLDER = "scripts/gpu"
VALUES = {"gpu": "g", "part": "p", "cores": 1, "minutes": 1, "index": 0, "data": "d", "wheels": "''"}


@pytest.fixture(scope="module")
def parts() -> ModuleType:
    return load_script("parts", FOLDER)


@pytest.fixture(scope="module")
def schedule() -> ModuleType:
    return load_script("schedule", FOLDER)


def call(*words: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, **({} if path is None else {"PATH": path})}
    return subprocess.run(["bash", str(ROOT / "scripts" / "gpu.sh"), *words], env=environment, capture_output=True, text=True, check=False)


def test_parts_name_what_exists(parts: ModuleType) -> None:
    for part in parts.PARTS:
        assert all((ROOT / file).is_file() for file in part.files()), part.name
        assert part.files() or "-m twofour" in part.command or part.name == "tests-cpu-suite", part.name
        assert shlex.split(part.command.format(**VALUES))
        assert all(name in parts.BY_NAME for name in part.after)
        assert part.limit > part.seconds or part.least is not None
    assert len(parts.BY_NAME) == len(parts.PARTS)
    for names in parts.BLOCKS.values():
        assert parts.chosen(names.split())


def test_the_accuracy_has_all_the_data_it_reads(parts: ModuleType) -> None:
    files = ("arms", "networks", "sentences")
    read = {name for file in files for name in re.findall(r'folder / "([\w-]+)"', (ROOT / "evidence" / f"{file}.py").read_text())}
    assert read == set(parts.BY_NAME["accuracy"].data)


def test_every_gpu_test_is_in_a_part(parts: ModuleType) -> None:
    named = {file for part in parts.PARTS if part.name.startswith("tests-") for file in part.files()}
    marked = {f"tests/{path.name}" for path in (ROOT / "tests").glob("test_*.py") if "pytest.mark.gpu" in path.read_text(encoding="utf-8")}
    assert marked - {"tests/test_gpu_runner.py"} == named - {"tests/test_report_page.py"}


def test_the_networks_are_those_of_the_rows(parts: ModuleType) -> None:
    rows = load_script("engine_rows", "evidence")
    assert {name: spec for name, (spec, _, _) in parts.NETWORKS.items()} == {name: spec for name, (spec, _) in rows.NETWORKS.items()}


def test_the_schedule_keeps_its_rules(parts: ModuleType, schedule: ModuleType) -> None:
    for block, names in parts.BLOCKS.items():
        planned = schedule.predicted(parts.chosen(names.split()), 31, 2, 570)
        for begin, end, part, place in planned:
            assert 0 <= begin < end <= 570, (block, part.name)
            assert len(place.cores) == part.cores
            assert len(place.gpus) == part.gpus
            beside = [(other, there) for first, last, other, there in planned if other is not part and first < end and begin < last]
            assert not any(set(place.cores) & set(there.cores) for _, there in beside)
            if part.quiet:
                assert not any(set(place.gpus) & set(there.gpus) for _, there in beside)
                assert all(other.quiet or not other.gpus for other, _ in beside)
            assert not any(other.name in part.after for other, _ in beside)


def test_on_a_small_machine_parts_take_turns(parts: ModuleType, schedule: ModuleType) -> None:
    planned = schedule.predicted(parts.chosen(["tests"]), 4, 1, 5000)
    ends = [0, *(end for _, end, _, _ in planned)]
    assert [begin for begin, _, _, _ in planned] == ends[:-1]
    assert {part.name for _, _, part, _ in planned} == set(parts.GROUPS["tests"]) - {"tests-two-gpus"}


def test_the_list_and_wrong_calls(parts: ModuleType) -> None:
    listed = call("--list")
    assert listed.returncode == 0
    assert all(f"\n{part.name} " in f"\n{listed.stdout}" for part in parts.PARTS)
    for words, sentence in (
        (("rowz",), "there is no part or group 'rowz', expected one of those that --list prints"),
        ((), "expected a PART or --block"),
        (("soak", "--data", "nowhere"), "folder 'nowhere' does not exist"),
    ):
        wrong = call(*words)
        assert (wrong.returncode, sentence in wrong.stderr) == (2, True), wrong.stderr
    bare = call("soak", path="/usr/bin:/bin")
    assert bare.returncode == 2
    assert "`nvidia-smi` names no GPU" in bare.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").rglob("*.sh")), ids=lambda p: p.name)
def test_shell_scripts_are_whole(path: Path) -> None:
    assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0
    assert "set -euo pipefail" in path.read_text(encoding="utf-8")


def test_parts_run_stop_and_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = load_script("run", FOLDER)
    tools, data = tmp_path / "bin", tmp_path / "material" / "cifar10"
    tools.mkdir()
    data.mkdir(parents=True)
    data.joinpath("x.npy").write_text("images")
    smi = tools / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'NVIDIA H200'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    plain = replace(run.PARTS[0], quiet=False, publish=None, cores=1, gpus=0, limit=60)
    wait = "trap 'echo told; exit 1' INT; sleep 30 & wait"
    parts = [
        replace(plain, name="passes", command="sh -c 'cp {data}/cifar10/x.npy kept/x.json; echo $CUDA_VISIBLE_DEVICES.'",
                gpus=1, seconds=1, data=("cifar10",), publish=("kept/x.json", "results/{gpu}/x.json")),
        replace(plain, name="fails", command="sh -c 'echo its last words; exit 3'", seconds=1),
        replace(plain, name="stays", command=f"bash -c {shlex.quote(wait)}", seconds=1, limit=1),
        replace(plain, name="long", command="true", seconds=999),
        replace(plain, name="without", command="true", seconds=1, data=("minilm",)),
    ]  # fmt: skip
    options = dict.fromkeys(("tar", "wheels")) | {"out": tmp_path / "out", "data": [data.parent]}
    mine = os.sched_getaffinity(0)
    try:
        runner = run.Runner(run.argparse.Namespace(**options))
        assert runner.why_not(parts[4]) == "--data has no minilm"
        begin = time.monotonic()
        assert not runner.run(parts[:4], [1], 20.0)
    finally:
        os.sched_setaffinity(0, mine)
    assert time.monotonic() - begin < 15
    lines = [line.split("\t") for line in (tmp_path / "out" / "outcomes.tsv").read_text().splitlines()]
    found = {name: (where, code, last) for name, where, code, _, _, last in lines}
    assert found == {"passes": ("gpu 1", "rc 0", "1."), "fails": ("gpu ", "rc 3", "its last words"), "stays": ("gpu ", "rc 124", "told")}
    again = run.Runner(run.argparse.Namespace(**options | {"data": []}))
    assert [again.is_done(part) for part in parts[:3]] == [True, False, False]
    assert not again.is_done(replace(parts[0], makes="kept/none"))
    assert again.why_not(parts[0]) is None
    with tarfile.open(tmp_path / "out.tgz") as tar:
        names = tar.getnames()
    assert {"outcomes.tsv", "kept/x.json", "results/nvidia-h200/x.json", "results/nvidia-h200/gemm.json", "logs/passes.log"} <= set(names)
    assert not [name for name in names if name.startswith(("code", "data", "runs"))]
