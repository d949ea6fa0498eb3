"""docs/methods.md: its tables are those of the results, it names every method, and so does the command's help."""

import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from script_loader import load_script

from twofour.cli import options
from twofour.pruning.methods import METHODS

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("methods")


def test_the_tables_are_those_of_the_results(script: ModuleType) -> None:
    assert script.filled(PAGE) == PAGE, "run: python scripts/methods.py"


def test_every_method_is_explained_and_in_the_help() -> None:
    assert re.findall(r"^\| `([\w-]+)` \| (?:the largest|what|the support)", PAGE, re.MULTILINE) == list(METHODS)
    import click

    @click.command()
    @options.method_option
    def command(method: str) -> None: ...

    (parameter,) = (p for p in command.params if p.name == "method")
    assert isinstance(parameter, click.Option)
    assert parameter.help is not None
    assert re.findall(r"[\w-]+", parameter.help.partition(": ")[2].replace("or by calibration data", "")) == list(METHODS)


def test_every_method_was_measured_on_every_network(script: ModuleType) -> None:
    rows = script.read(script.METHODS)["rows"]
    for net in {row["net"] for row in rows}:
        assert {row["method"] for row in rows if row["net"] == net and not row["permuted"]} == {"", *METHODS}


def test_retrained_rows_are_a_table_of_their_own(script: ModuleType) -> None:
    def row(method: str, seed: int | None, value: float) -> dict[str, Any]:
        about = {"net": "ResNet-20", "method": method, "permuted": False, "seed": seed, "value": value, "data": "CIFAR-10 test"}
        if seed is None:
            variant = "2:4 one-shot" if method else "dense"
            return about | {"metric": "accuracy", "variant": variant, "cpu_seconds": 1.0, "peak_bytes": 0, "mean_output_error": None}
        recipe = {"batch": 128, "lr": 0.02, "distill": 0.5}
        return about | {"variant": "2:4 retrained", "recipe": recipe, "steps": 190, "images": 2500, "device": "CPU"}

    oneshot = [row("", None, 91.0), row("magnitude", None, 70.0)]
    trained = [row("", 0, 92.0), row("magnitude", 0, 88.0), row("magnitude", 1, 90.0)]
    (table,) = script.retrained_table({"rows": oneshot + trained})
    assert "| method | ResNet-20 one-shot | ResNet-20 retrained |" in table
    assert "| dense, the same training | 91.00 | 92.00 |" in table
    assert "| `magnitude` | 70.00 | 89.00 ± 1.41 |" in table
    assert "190 steps of 128 out of 2,500 training images" in table
    assert "2 seeds; plain order; CPU." in table
    assert script.retrained_table({"rows": oneshot}) == []
    assert script.network_table("ResNet-20", {"rows": oneshot + trained}) == script.network_table("ResNet-20", {"rows": oneshot})
