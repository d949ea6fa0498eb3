"""docs/methods.md: its tables are those of the results, it names every method, and so does the command's help."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from twofour.cli import options
from twofour.pruning.methods import METHODS

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("methods_page", ROOT / "scripts" / "methods.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
