"""Names that mean nothing, and files that are there but cannot be read: one sentence that says which, at once."""

import os
import sys
from pathlib import Path

import pytest

from twofour.cli import main
from twofour.compress import compress
from twofour.errors import InputError
from twofour.report import Report
from twofour.sources import resolve_model, resolve_task

# A file that opens and gives an error when it is read, to root too: the first page of a process's memory.
UNREADABLE = Path("/proc/self/mem")
OWN = """
import json
from torch import nn
import torch
x, y = torch.randn(16, 8), torch.arange(16) % 2

def net(num_classes):
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, num_classes))

def data():
    return torch.utils.data.TensorDataset(x, y), torch.utils.data.TensorDataset(x, y)

def reads():
    return json.loads("{")
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(OWN)
    Path("r.toml").write_text("epochs = 1\nbatch = 8\n")
    return tmp_path


def told(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The only line on standard error of a command that exits with 2."""
    with pytest.raises(SystemExit) as stop:
        main(list(args))
    written = capsys.readouterr()
    assert (stop.value.code, written.out, len(written.err.splitlines())) == (2, "", 1), written.err
    return written.err.removeprefix("twofour: ").strip()


@pytest.mark.parametrize(
    "args",
    [
        ("compress", "own.py:net", "--data", "own.py:data", "--recipe", "r.toml", "--out", ""),
        ("compress", "own.py:net", "--data", "own.py:data", "--recipe", "r.toml", "--out", "  "),
        ("compress", "own.py:net", "--data", "own.py:data", "--recipe", "r.toml", "--weights", ""),
        ("report", ""),
        ("report", "run", "--out", ""),
        ("inspect", "\n"),
    ],
)
def test_a_blank_path_is_not_the_current_folder(here: Path, capsys: pytest.CaptureFixture[str], args: tuple[str, ...]) -> None:
    assert "is blank, expected a file or folder" in told(capsys, *args)
    assert sorted(p.name for p in here.iterdir()) == ["own.py", "r.toml"]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("hf:", r"model 'hf:' names no network, expected hf:NAME_OR_DIR"),
        ("hf: ", r"model 'hf: ' names no network, expected hf:NAME_OR_DIR"),
        ("torchvision:", r"model 'torchvision:' names no network, expected torchvision:NAME"),
        ("timm:\t", r"model 'timm:\\t' names no network, expected timm:NAME"),
        ("", r"model '' is unknown, expected one of"),
        ("hf:a\nb", r"^model 'hf:a\\nb' is neither a folder with config.json nor to be had from the hub: [^\n]*$"),
    ],
)
def test_a_model_that_is_named_by_its_zoo_alone(here: Path, model: str, message: str) -> None:
    # Not taken for the current folder, although that could be one of Transformers.
    Path("config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(InputError, match=message) as caught:
        resolve_model(model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("cifar10:", r"data 'cifar10:' name no folder, expected cifar10:DIR"),
        ("imagefolder: ", r"data 'imagefolder: ' name no folder, expected imagefolder:DIR"),
        ("imagefolder@32:", r"data 'imagefolder@32:' name no folder, expected imagefolder@32:DIR"),
        ("imagefolder@²:x", r"size '²' is no positive number of pixels; write imagefolder@224:DIR"),
        ("imagefolder:/dev/null", r"image folder '/dev/null' is a file; name a folder with train/CLASS"),
    ],
)
def test_data_that_are_named_by_their_kind_alone(data: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        resolve_task(data)


@pytest.mark.parametrize("out", ["/proc/x", "own.py/x", "n" * 300, "dangling", "a\0b"])
def test_an_output_folder_that_cannot_be_made(here: Path, out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)  # not even the bytecode of own.py is left behind
    Path("dangling").symlink_to("nowhere/none")
    before = sorted(here.iterdir())
    with pytest.raises(InputError, match=r"^output folder '.*' cannot be used: .*; name another --out$"):
        compress("own.py:net", "own.py:data", out=out, recipe="r.toml", permute=False)
    assert sorted(here.iterdir()) == before


def test_an_output_folder_with_a_newline_in_its_name_is_one(here: Path) -> None:
    done = compress("own.py:net", "own.py:data", out="two\nlines", recipe="r.toml", permute=False, measure_seconds=0.02)
    assert Report.load(here / "two\nlines" / "report.json") == done.report
    with pytest.raises(InputError, match=r"^output folder 'two\\nlines' holds a run"):
        compress("own.py:net", "own.py:data", out="two\nlines", recipe="r.toml")


@pytest.mark.skipif(not UNREADABLE.exists(), reason="needs a file of the system that cannot be read")
def test_files_that_open_but_cannot_be_read_are_named(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("w.safetensors", "m.py", "m.toml", "report.json"):
        Path(name).symlink_to(UNREADABLE)
    asked = ("--data", "own.py:data", "--recipe", "r.toml", "--out", "run")
    assert told(capsys, "compress", "own.py:net", *asked, "--weights", "w.safetensors").startswith("file 'w.safetensors' cannot be read: ")
    assert told(capsys, "compress", "m.py:net", *asked).startswith("file 'm.py' cannot be read: ")
    assert told(capsys, "compress", "own.py:net", *asked, "--recipe", "m.toml").startswith("recipe 'm.toml' cannot be read: ")
    assert told(capsys, "report", ".").startswith("report 'report.json' cannot be read: ")
    assert not Path("run").exists()


def test_files_that_are_none_are_told_from_missing_ones(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("compress", "own.py:net", "--data", "own.py:data", "--recipe", "r.toml")
    assert told(capsys, *asked, "--weights", os.devnull) == f"weights file {os.devnull!r} is a device or a pipe, expected a file"
    Path("gone.pt").symlink_to("none")
    assert told(capsys, *asked, "--weights", "gone.pt") == "weights file 'gone.pt' does not exist"
    with pytest.raises(InputError, match=r"^file 'none.py' does not exist$"):
        compress("none.py:net", "own.py:data", out="run", recipe="r.toml")


def test_an_empty_recipe_is_not_the_default(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert told(capsys, "compress", "demo", "--data", "digits", "--recipe", "").startswith("recipe '' is neither a file nor one of")
    assert told(capsys, "train", "demo", "--data", "digits", "--recipe", "", "--out", "a.safetensors").startswith("recipe '' is neither")


def test_a_report_that_is_not_there_or_too_deep(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert told(capsys, "report", ".") == (
        "report 'report.json' does not exist; name the folder of a finished run, one that was stopped needs --resume"
    )
    Path("report.json").write_text("[" * 100_000)
    assert told(capsys, "report", ".").startswith("report 'report.json' is damaged: it holds no JSON object (")


def test_a_missing_argument_names_its_choices_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert told(capsys, "completion") == "Missing argument '{bash|zsh|fish}'. Choose from: bash, zsh, fish"
    assert "'csh' is not one of 'bash', 'zsh', 'fish'" in told(capsys, "completion", "csh")


def test_the_users_line_is_named_where_the_standard_library_raised(here: Path) -> None:
    line = OWN.splitlines().index('    return json.loads("{")') + 1
    with pytest.raises(InputError, match=rf"JSONDecodeError: .* \(line {line} of '.*own.py', in reads\)$"):
        resolve_task("own.py:reads")
