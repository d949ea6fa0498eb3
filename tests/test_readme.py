"""What the README says runs: its commands, its Python, its table."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

from twofour.cli import main
from twofour.sources import resolve_model

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
# One epoch instead of twelve: the commands are under test here, not the accuracy.
SHORTER = {"compress": ["--epochs", "1", "--seeds", "1"], "train": ["--epochs", "1"], "measure": ["--seconds", "0.1", "--no-memory"]}


def commands() -> list[list[str]]:
    blocks = re.findall(r"```\n(.*?)```", README, re.DOTALL)
    return [shlex.split(line, comments=True)[1:] for block in blocks for line in block.splitlines() if line.startswith("twofour ")]


def test_the_commands_run_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(commands()) >= 8
    for command in commands():
        with pytest.raises(SystemExit) as stop:
            main([*command, *SHORTER.get(command[0], [])])
        assert not stop.value.code, (command, capsys.readouterr().err)
    assert (tmp_path / "runs" / "demo-digits" / "report.html").is_file()
    assert (tmp_path / "model.plan").is_file()


def test_a_word_has_one_meaning() -> None:
    lines = (ROOT / "docs" / "words.md").read_text(encoding="utf-8").splitlines()
    words = [line.split("|")[1].strip() for line in lines if line.startswith("| ")]
    assert len(words) > 40
    assert [word for word in words if words.count(word) > 1] == []


def test_the_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = resolve_model("demo").make(10)
    images = torch.randn(4, 1, 8, 8)
    names = {
        "torch": torch,
        "model": model,
        "images": images,
        "optimizer": torch.optim.SGD(model.parameters(), 0.1, momentum=0.9),
        "batches": [(images, torch.arange(4))] * 3,
    }
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(compile(block, "README.md", "exec"), names)
    pruning = names["pruning"]
    for name, parameter in model.named_parameters():
        if name in pruning.masks:  # type: ignore[attr-defined]
            assert not parameter[~pruning.masks[name]].any()  # type: ignore[attr-defined]
    assert names["handle"].num_steps == 3  # type: ignore[attr-defined]
    assert torch.is_tensor(names["outputs"])


def test_the_tables_are_the_recorded_ones_without_stale_rows() -> None:
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import readme
    finally:
        sys.path.pop(0)
    assert readme.filled(README, readme.TABLES) == README
    for name, tables in (("engine", readme.PAGE_TABLES), ("training", readme.TRAINING_TABLES)):
        page = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
        assert readme.filled(page, tables) == page, name


def test_every_link_to_a_file_leads_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
