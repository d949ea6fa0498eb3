"""The command line as a user types it: each step on its own, one sentence and exit code 2 for what is wrong."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import twofour
from twofour.cli import main
from twofour.cli.group import COMMANDS
from twofour.compress import Compression
from twofour.version import __version__


class Outcome:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):  # type: ignore[no-untyped-def]
    """Run `twofour …` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*args: str | Path) -> Outcome:
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in args])
        captured = capsys.readouterr()
        return Outcome(int(stop.value.code or 0), captured.out, captured.err)

    return call


def test_version_and_help(run) -> None:  # type: ignore[no-untyped-def]
    assert run("--version").out.split()[-1] == __version__
    text = run("--help").out
    assert all(name in text for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_its_first_line_says_what_it_does(run, name: str) -> None:  # type: ignore[no-untyped-def]
    outcome = run(name, "--help")
    assert outcome.code == 0
    assert outcome.out.startswith(f"Usage: twofour {name} ")


def test_the_steps_on_their_own(run, short_run: Compression) -> None:  # type: ignore[no-untyped-def]
    assert run("train", "demo", "--data", "digits", "--epochs", "1", "--out", "dense.safetensors").code == 0
    pruned = run("prune", "demo", "--data", "digits", "--weights", "dense.safetensors", "--out", "pruned.safetensors")
    assert "8 of 10 layers 2:4" in pruned.out
    assert "classifier: the last linear" in pruned.out
    trained = run("train", "demo", "--data", "digits", "--weights", "pruned.safetensors", "--epochs", "1", "--out", "sparse.safetensors")
    assert "Checkpoint(demo, 2:4, accuracy" in trained.out
    assert run("inspect", "sparse.safetensors", "--require").code == 0
    assert run("inspect", "dense.safetensors", "--require").code == 1
    exported = run("export", "demo", "--data", "digits", "--weights", "sparse.safetensors", "--out", "sparse.onnx")
    assert "8 of 8 eligible weights are 2:4" in exported.out
    built = run("build", "sparse.onnx", "-o", "model.plan")
    assert "no sparse kernels: ONNX Runtime has no 2:4 kernel on a CPU" in built.out
    np.save("x.npy", np.random.default_rng(0).standard_normal((5, 1, 8, 8)).astype(np.float32))
    assert "float32[5, 10]" in run("run", "model.plan", "--input", "x.npy", "--output", "y.npz").out
    with np.load("y.npz") as outputs:
        assert [v.shape for v in outputs.values()] == [(5, 10)]
    measured = json.loads(run("measure", "model.plan", "sparse.onnx", "--batch", "2", "--seconds", "0.1", "--no-memory", "--json").out)
    assert [row["name"] for row in measured] == ["model.plan", "sparse.onnx"]
    table = run("measure", "model.plan", "--batch", "1", "--seconds", "0.1", "--no-memory").out
    assert "median ms" in table
    assert not list(Path().glob(".*"))


def test_a_folder_of_safetensors_is_pruned_on_disk(run) -> None:  # type: ignore[no-untyped-def]
    import torch
    from safetensors.torch import save_file

    Path("dense").mkdir()
    save_file({"layer.weight": torch.randn(8, 16), "embed.weight": torch.randn(4, 16)}, "dense/model.safetensors")
    outcome = run("prune", "dense", "--out", "sparse")
    assert "1 of 2 layers 2:4" in outcome.out
    verdicts = json.loads(run("inspect", "sparse/model.safetensors", "--json").out)["weights"]
    assert {w["name"]: w["is_24"] for w in verdicts} == {"layer.weight": True, "embed.weight": False}


def test_inspect_as_json(run, short_run: Compression) -> None:  # type: ignore[no-untyped-def]
    value = json.loads(run("inspect", short_run.out / "sparse.onnx", "--json").out)
    assert value["is_24"] is True
    assert sum(w["is_24"] and w["required"] for w in value["weights"]) == 8


def test_models_lists_what_is_installed_and_takes_a_glob(run) -> None:  # type: ignore[no-untyped-def]
    assert "demo" in run("models").out.split()
    assert run("models", "d?mo").out.split() == ["demo"]
    assert "matches no model" in run("models", "nothing:*").err


def test_doctor_names_every_package_and_the_line_for_what_is_missing(run) -> None:  # type: ignore[no-untyped-def]
    text = run("doctor").out
    for word in ("torch", "onnxruntime", "cuda-core", "backend onnxruntime: works"):
        assert word in text
    for line in text.splitlines():
        if "│ –" in line:
            assert "pip install" in line


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["compres"], r"no such command 'compres', expected one of compress, .*did you mean 'compress'\?"),
        (["compress"], r"missing argument 'MODEL'"),
        (["compress", "demo"], r"missing option '--data'"),
        (["compress", "demo", "--data", "digits", "--sedes", "3"], r"no such option.*--sedes"),
        (["compress", "demo", "--data", "digits", "--epochs", "-1"], r"-1 is not in the range"),
        (["compress", "demo", "--data", "digits", "--seeds", "0"], r"0 is not in the range"),
        (["compress", "demo", "--data", "digitz"], r"data 'digitz' is unknown.*did you mean 'digits'\?"),
        (
            ["prune", "demo", "--data", "digits", "--out", "x.safetensors"],
            r"prune: no weights given, expected --weights FILE with the dense network",
        ),
        (["prune", "demo", "--out", "x.safetensors"], r"prune: no data given, expected --data NAME; or give a folder of safetensors"),
        (["prune", __file__, "--out", "x"], r"prune: '.*test_cli.py' is no safetensors file, expected one, a folder of them, or MODEL"),
        (["prune", "no/such", "--out", "x"], r"no/such"),
        (["prune", "nodir", "--out", "x"], r"prune: 'nodir' does not exist, expected a folder with safetensors files, one such file or a"),
        (["prune", "a.safetensors", "--out", "x", "--permute"], r"prune: --permute needs the network, expected MODEL with --data"),
        (["prune", "a.safetensors", "--out", "x", "--method", "wanda"], r"method 'wanda' needs the network, expected magnitude for files"),
        (["train", "demo", "--data", "digits", "--out", "x.txt"], r"--out 'x.txt' does not end with .safetensors"),
        (["inspect", "x" * 300 + ".onnx"], r"cannot be read: File name too long"),
        (["build", "/tmp", "-o", "x.plan"], r"ONNX file '/tmp' is a folder"),
        (["export", "demo", "--data", "digits", "--out", "x.onnx"], r"export: no weights given"),
        (
            ["train", "demo", "--data", "digits", "--out", "no/such/x.safetensors"],
            r"--out 'no/such/x.safetensors' is a folder or lies in none",
        ),
        (["build", "none.onnx", "-o", "x.plan"], r"ONNX file 'none.onnx' does not exist"),
        (["build", "none.onnx", "-o", "x.plan", "--batch", "1,x"], r"--batch '1,x' is no list of sizes"),
        (["run", "none.plan", "--input", "x.npy", "--output", "y.npz"], r"plan 'none.plan' does not exist"),
        (["measure"], r"missing argument 'FILES… | gemm'"),
        (["measure", "none.onnx"], r"measure: file 'none.onnx' does not exist"),
        (["measure", "gemm", "--shape", "8x8"], r"--shape '8x8' is not three positive integers"),
        (["measure", "gemm", "--shape", "8x8x²"], r"--shape '8x8x²' is not three positive integers"),
        (["measure", "gemm", "--shape", "8x8x" + "9" * 5000], r"--shape '8x8x9+' is not three positive integers"),
        (
            ["measure", "gemm", "--shape", "512x6145x4096"],
            r"--shape '512x6145x4096': outputs is 6145, expected a positive multiple of 8",
        ),
        (["measure", "gemm", "--shape", "0x8x8"], r"--shape '0x8x8': tokens is 0, expected a positive multiple of 1"),
        (["measure", "gemm", "--batch", "3"], r"measure: --batch is not for `twofour measure gemm`; leave it out"),
        (["measure", "none.onnx", "--out", "x.json"], r"measure: --out is only for `twofour measure gemm`; leave it out"),
        (["measure", "gemm", "--dtype", "int4"], r"'int4' is not one of 'bf16', 'fp16'"),
        (["inspect", "none.onnx"], r"inspect: file 'none.onnx' does not exist"),
    ],
)
def test_what_is_wrong_gets_one_sentence_and_exit_code_2(run, tmp_path: Path, args: list[str], sentence: str) -> None:  # type: ignore[no-untyped-def]
    outcome = run(*args)
    assert outcome.code == 2
    assert re.search(sentence, outcome.err, re.IGNORECASE), outcome.err
    assert outcome.err.startswith("twofour: ")
    assert "Traceback" not in outcome.err
    assert not [p for p in tmp_path.iterdir() if p.suffix]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "input file 'x.npz' does not exist"),
        (b"junk", r"is no \.npy or \.npz of plain arrays"),
    ],
)
def test_run_refuses_bad_inputs(run, short_run: Compression, content: bytes | None, sentence: str) -> None:  # type: ignore[no-untyped-def]
    if content is not None:
        Path("x.npz").write_bytes(content)
    outcome = run("run", short_run.out / "model.plan", "--input", "x.npz", "--output", "y.npz")
    assert outcome.code == 2
    assert re.search(sentence, outcome.err)
    np.savez("other.npz", other=np.ones(3))
    assert "also needs ['x']" in run("run", short_run.out / "model.plan", "--input", "other.npz", "--output", "y.npz").err
    np.save("object.npy", np.array([{}], dtype=object), allow_pickle=True)
    assert "of plain arrays" in run("run", short_run.out / "model.plan", "--input", "object.npy", "--output", "y.npz").err
    assert not Path("y.npz").exists()


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from twofour.errors import InputError

    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        main(["--debug", "inspect", "none.onnx"])


def test_a_terminal_without_colour_gets_plain_text(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "twofour", "doctor"], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert "\x1b" not in done.stdout


def test_names_are_not_markup_and_paths_are_not_wrapped(run, short_run: Compression) -> None:  # type: ignore[no-untyped-def]
    folder = Path("a [red]b[/b]")
    folder.mkdir(parents=True)
    path = folder / "s.onnx"
    path.write_bytes((short_run.out / "sparse.onnx").read_bytes())
    assert str(path) in run("inspect", path).out
    assert str(path) in run("measure", path, "--batch", "1", "--seconds", "0.1", "--no-memory").out.replace("\n", "")


def test_an_input_is_never_overwritten(run, short_run: Compression) -> None:  # type: ignore[no-untyped-def]
    Path("m.onnx").write_bytes((short_run.out / "sparse.onnx").read_bytes())
    Path("d.safetensors").write_bytes((short_run.out / "dense.safetensors").read_bytes())
    for args in (
        ("build", "m.onnx", "-o", "m.onnx"),
        ("prune", "demo", "--data", "digits", "--weights", "d.safetensors", "--out", "d.safetensors"),
        ("train", "demo", "--data", "digits", "--weights", "d.safetensors", "--out", "d.safetensors"),
    ):
        assert "is the input, expected another name; nothing is overwritten" in run(*args).err


def test_a_known_model_wins_over_a_folder_of_its_name(run) -> None:  # type: ignore[no-untyped-def]
    Path("demo").mkdir()
    assert "prune: no data given" in run("prune", "demo", "--out", "x.safetensors").err
    assert "names files, expected a model for --data" in run("prune", "./demo", "--data", "digits", "--out", "x").err
    assert "is made a folder, expected a folder's name" in run("prune", "./demo", "--out", "x.safetensors").err


def test_retraining_holds_any_recorded_pattern(run, short_run: Compression) -> None:  # type: ignore[no-untyped-def]
    from twofour.training import Checkpoint

    weights = short_run.out / "dense.safetensors"
    run("prune", "demo", "--data", "digits", "--weights", weights, "--pattern", "1:4", "--no-permute", "--out", "p.safetensors")
    said = run("train", "demo", "--data", "digits", "--weights", "p.safetensors", "--epochs", "1", "--out", "t.safetensors").out
    assert "Checkpoint(demo, 1:4, accuracy" in said
    kept = Checkpoint.load("t.safetensors").state["stages.0.conv1.weight"] != 0
    assert float(kept.float().mean()) <= 0.25


def test_out_of_memory_and_the_system_are_one_sentence() -> None:
    from twofour.cli.group import sentence_of

    assert sentence_of(MemoryError()) == "out of memory; use a smaller batch or file"
    assert "out of memory (Unable to allocate" in sentence_of(MemoryError("Unable to allocate 3 TiB"))
    assert (
        sentence_of(PermissionError(13, "Permission denied", "x"))
        == "file 'x': Permission denied; check the path, its permissions and the disk"
    )
    assert sentence_of(OSError("odd")) == "the system refused: odd"


def test_a_header_that_claims_more_than_the_file_holds_is_refused(run, short_run: Compression) -> None:  # type: ignore[no-untyped-def]
    with Path("x.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (10**11, 1, 8, 8)})
    assert "no .npy or .npz of plain arrays" in run("run", short_run.out / "model.plan", "--input", "x.npy", "--output", "y.npz").err


def events_of(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


def test_compress_tells_events_as_json_lines_and_resumes(run, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    import resume_worker

    from twofour.training import loop

    assert resume_worker.small_task().name == "small"
    Path("r.toml").write_text("epochs = 2\nbatch = 16\n[optimizer]\nlr = 1e-3\n")
    asked = ("compress", "small", "--data", "small", "--recipe", "r.toml", "--no-permute", "--out", "run", "--json")
    step, calls = loop._Run._step, []

    def interrupted(self: Any, *batch: Any) -> Any:
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return step(self, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Run, "_step", interrupted)
        first = run(*asked)
    assert first.code == 130
    assert first.err.strip() == "twofour: interrupted; the same command with --resume goes on"
    assert [event["event"] for event in events_of(first.out)] == ["stage_started", "epoch_finished", "failed"]
    again = run(*asked)
    assert again.code == 2
    assert events_of(again.out)[-1] | {"time": 0} == {"event": "failed", "time": 0, "message": again.err[len("twofour: ") :].strip()}
    assert "holds a run that was stopped; go on with --resume" in again.err
    done = run(*asked, "--resume")
    assert done.code == 0, done.err
    kinds = [event["event"] for event in events_of(done.out)]
    assert kinds[:2] == ["stage_started", "epochs_restored"]
    assert kinds.count("epoch_finished") == 5
    last = events_of(done.out)[-1]
    assert (last["event"], last["out"], last["metric"]) == ("finished", "run", "accuracy")
    assert last["accuracy"]["2:4"]
    finished = run(*(word for word in asked if word != "--json"), "--resume", "--quiet")
    lines = [line for line in finished.out.splitlines() if line.strip()]
    assert lines[0].startswith("small on small")
    assert not [line for line in lines if line.startswith("✓") or "Report:" in line]
    assert "expected one of them" in run(*asked, "--quiet").err
    assert "run.json" in {p.name for p in Path("run").iterdir()}


def test_train_goes_on_where_it_was_stopped(run, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    import resume_worker
    import torch

    from twofour.training import Checkpoint, loop

    assert resume_worker.small_task().name == "small"
    Path("r.toml").write_text("epochs = 3\nbatch = 16\n[optimizer]\nlr = 1e-2\n")
    asked = ("train", "small", "--data", "small", "--recipe", "r.toml")
    assert run(*asked, "--out", "whole.safetensors").code == 0
    step, calls = loop._Run._step, []

    def interrupted(self: Any, *batch: Any) -> Any:
        calls.append(1)
        if len(calls) == 15:
            raise KeyboardInterrupt
        return step(self, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Run, "_step", interrupted)
        assert run(*asked, "--out", "w.safetensors").code == 130
    assert Path("w.safetensors.training").exists()
    assert "is the state of a training that was stopped; go on with --resume" in run(*asked, "--out", "w.safetensors").err
    other = run(*asked, "--out", "w.safetensors", "--resume", "--epochs", "5")
    assert (other.code, "is of another training: recipe was" in other.err) == (2, True)
    assert "2 of 3 epochs were done before" in run(*asked, "--out", "w.safetensors", "--resume").out
    ours, theirs = (Checkpoint.load(name).state for name in ("w.safetensors", "whole.safetensors"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not Path("w.safetensors.training").exists()


def test_a_check_that_fails_exits_with_1_and_wrong_input_with_2(run, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    from twofour.errors import InputError, VerificationError
    from twofour.exchange import inspect as room

    for kind, code in ((VerificationError, 1), (InputError, 2)):

        def fails(path: Path, kind: type[Exception] = kind) -> None:
            raise kind("it differs")

        monkeypatch.setattr("twofour.exchange.inspect", fails)
        assert (run("inspect", "x.onnx").code, room is not None) == (code, True)


def test_report_is_made_again_and_runs_are_compared(run, short_run: Compression, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    import shutil

    from report_sample import sample

    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    shutil.copy(short_run.out / "report.json", one)
    (two / "report.json").write_text(sample().model_dump_json())
    assert run("report", one).code == 0
    # The same record gives the same page, whenever it is made.
    assert (one / "report.html").read_text() == (short_run.out / "report.html").read_text()
    compared = run("report", one, two / "report.json")
    assert (compared.code, compared.out.splitlines()[-1]) == (0, "comparison.html")
    assert "different machines" in compared.out
    page = Path("comparison.html").read_text()
    assert "recipe.epochs" in page
    for args, told in (
        (("report", "nowhere"), "report 'nowhere' does not exist"),
        (("report", one, one), "is given twice, expected each run once"),
        (("report", one, "--out", "x.txt"), "does not end with .html"),
        (("report", tmp_path), "report.json' does not exist"),
    ):
        outcome = run(*args)
        assert (outcome.code, told in outcome.err) == (2, True), outcome.err


def completed(line: str, folder: Path) -> list[str]:
    """What bash offers at the end of `line`, with our script loaded."""
    script = r"""
eval "$(twofour completion bash)"
compopt() { :; }
COMP_WORDBREAKS=$' \t\n"\'><=;|&(:'
COMP_LINE="$1"; COMP_POINT=${#1}
_twofour_completion twofour
printf '%s\n' "${COMPREPLY[@]}"
"""
    binaries = folder / "bin"
    binaries.mkdir(exist_ok=True)
    (binaries / "twofour").write_text(f'#!/bin/sh\nexec {sys.executable} -m twofour "$@"\n')
    (binaries / "twofour").chmod(0o755)
    environment = {**os.environ, "PATH": f"{binaries}:{os.environ['PATH']}", "XDG_CACHE_HOME": str(folder / "cache")}
    done = subprocess.run(["bash", "-c", script, "bash", line], capture_output=True, text=True, cwd=folder, env=environment, check=True)
    assert not done.stderr, done.stderr
    return done.stdout.split()


def test_bash_completes_commands_options_and_names_with_colons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from twofour.cli.names import cache_file

    package = str(Path(twofour.__file__).parents[1])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([package, os.environ.get("PYTHONPATH", "")]))
    kept = tmp_path / "cache" / "twofour" / cache_file().name
    kept.parent.mkdir(parents=True)
    kept.write_text("demo\ntorchvision:resnet18\ntorchvision:resnet50\ntimm:resnet18\n")
    (tmp_path / "pictures" / "train").mkdir(parents=True)
    assert completed("twofour comp", tmp_path) == ["compress", "completion"]
    assert "--resume" in completed("twofour compress --re", tmp_path)
    assert completed("twofour compress torchv", tmp_path) == ["torchvision:"]
    # Bash replaces what stands behind the colon only.
    assert completed("twofour compress torchvision:resnet5", tmp_path) == ["resnet50"]
    assert completed("twofour compress demo --data imagefolder:pic", tmp_path) == ["pictures/"]
    assert completed("twofour train demo --recipe f", tmp_path) == ["finetune"]


def test_scripts_for_other_shells_and_the_list_of_models_is_kept(run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    from twofour.cli import names

    assert "#compdef twofour" in run("completion", "zsh").out
    assert "complete --no-files --command twofour" in run("completion", "fish").out
    assert run("completion", "csh").code == 2
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("twofour.sources.models.list_models", lambda: ["demo", "timm:a"])
    assert names.model_names() == ["demo", "timm:a"]
    monkeypatch.setattr("twofour.sources.models.list_models", lambda: ["other"])
    assert names.model_names() == ["demo", "timm:a"]


def test_no_color_and_no_terminal_are_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    from rich.console import Console

    from twofour.cli.progress import ProgressDisplay
    from twofour.compress.events import StageFinished, StageStarted

    for terminal, colour, escapes in ((True, False, True), (True, True, False), (False, False, False)):
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.setenv("NO_COLOR", "1") if colour else monkeypatch.delenv("NO_COLOR", raising=False)
        written = io.StringIO()
        console = Console(file=written, force_terminal=terminal, highlight=False)
        show = ProgressDisplay(console)
        show(StageStarted("export"))
        show(StageFinished("export", 1.0, ""))
        assert "export 1.0 s" in re.sub("\x1b\\[[0-9;]*m", "", written.getvalue())
        assert ("\x1b[32m" in written.getvalue()) == escapes


def test_progress_tells_items_a_second_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    from rich.console import Console

    from twofour.cli import progress
    from twofour.compress.events import EpochFinished, EpochsRestored, StageStarted, StepsDone
    from twofour.training import Epoch, Step

    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    written = io.StringIO()
    show = progress.ProgressDisplay(Console(file=written, width=200))
    show(StageStarted("train", 10))
    show(EpochsRestored("dense", 0, 4, 10))
    now[0] = 30.0
    show(StepsDone("dense", 0, Step(5, 640, 1280, 21.3), 10))
    now[0] = 60.0
    show(EpochFinished("dense", 0, Epoch(5, 0.5, 90.0, 0.1, 60.0), 10))
    lines = written.getvalue().splitlines()
    assert lines == [
        "  seed 0, dense: 4 of 10 epochs were done before",
        "  seed 0, dense: 21 items/s, about 6 min left, epoch 5 of 10, 640 of 1,280 items",
        "  seed 0, dense: loss 0.500, 90.00, about 5 min left, epoch 5 of 10",
    ]
    told = [progress.duration_text(s) for s in (42, 3700, 11_100, 190_000, 4e12)]
    assert told == ["42 s", "62 min", "3 h 05 min", "2 d 4 h", "126,839 years"]


def test_a_training_of_any_length_tells_its_time_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    from rich.console import Console

    from twofour.cli import progress
    from twofour.compress.events import EpochFinished, StageStarted
    from twofour.training import Epoch

    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    written = io.StringIO()
    show = progress.ProgressDisplay(Console(file=written, width=200))
    show(StageStarted("train", 10**9))
    for number in range(1, 31):
        now[0] += 0.5
        show(EpochFinished("dense", 0, Epoch(number, 0.5, 90.0, 0.1, 0.5), 10**9))
    assert written.getvalue().splitlines() == [
        f"  seed 0, dense: loss 0.500, 90.00, about 15 years left, epoch {number} of 1000000000" for number in (2, 22)
    ]


@pytest.mark.parametrize("option", ["--epochs", "--seeds"])
def test_a_number_that_no_time_can_be_told_for_is_refused(run, option: str) -> None:  # type: ignore[no-untyped-def]
    outcome = run("compress", "demo", "--data", "digits", option, "9" * 400)
    assert (outcome.code, "is not in the range 1<=x<=2147483648" in outcome.err) == (2, True), outcome.err


def test_the_documented_events_are_those_that_there_are() -> None:
    from dataclasses import fields

    from twofour.compress.events import NAMES

    page = (Path(__file__).parents[1] / "docs" / "compress.md").read_text(encoding="utf-8")
    documented = dict(re.findall(r"^\| `(\w+)` \| (`.*) \|$", page, re.MULTILINE))
    for kind, name in NAMES.items():
        told = re.findall(r"`(\w+)`", documented.pop(name))
        assert set(told) >= {field.name for field in fields(kind)}, name
    assert documented.keys() == {"finished", "failed"}


def test_a_finished_run_with_a_failed_check_writes_its_report_and_exits_with_1(run, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    import resume_worker

    from twofour.compress import checks

    assert resume_worker.small_task().name == "small"
    Path("r.toml").write_text("epochs = 1\nbatch = 16\n[optimizer]\nlr = 1e-3\n")
    asked = ("compress", "small", "--data", "small", "--recipe", "r.toml", "--no-permute", "--out", "run")
    monkeypatch.setattr(checks, "MOST_LOST_POINTS", -101.0)
    done = run(*asked, "--json")
    last = events_of(done.out)[-1]
    assert (done.code, last["event"], last["passed"], last["failed_checks"]) == (1, "finished", False, ["accuracy kept"])
    failed = [check for check in json.loads(Path("run/report.json").read_text())["checks"] if not check["passed"]]
    assert failed[0]["detail"].endswith("; one seed")
    for option in ((), ("--quiet",)):
        again = run(*asked, "--resume", *option)
        assert (again.code, "failed: accuracy kept" in again.out) == (1, True)


def test_a_reader_that_goes_away_ends_the_run_quietly(tmp_path: Path) -> None:
    package = str(Path(twofour.__file__).parents[1])
    command = [sys.executable, "-m", "twofour", "compress", "demo", "--data", "digits", "--epochs", "1", "--json", "--out", "run"]
    environment = {**os.environ, "PYTHONPATH": package}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment)
    assert process.stdout is not None
    assert process.stderr is not None
    assert json.loads(process.stdout.readline())["event"] == "stage_started"
    process.stdout.close()
    assert (process.stderr.read(), process.wait(100)) == ("", 141)


def test_a_folder_that_is_not_there_and_a_recipe_of_images_name_the_cure(run) -> None:  # type: ignore[no-untyped-def]
    for name in ("/nonexist", "./nonexist", "a/b/c"):
        outcome = run("compress", f"hf:{name}", "--data", "digits")
        assert (outcome.code, f"the folder '{name}' does not exist" in outcome.err) == (2, True), outcome.err
    Path("own.py").write_text("import torch\ndef data():\n    d = [(torch.ones(8), i % 2) for i in range(4)]\n    return d, d\n")
    outcome = run("compress", "demo", "--data", "own.py:data", "--recipe", "finetune")
    assert (outcome.code, "take the shipped recipe 'text', which has no [augmentation]" in outcome.err) == (2, True), outcome.err
