"""docs/methods.md: its tables are those of the results, it names every method, and so does the command's help."""

import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from script_loader import load_script

from twofour.cli import options
from twofour.pruning.batch_norm import UPDATING
from twofour.pruning.methods import METHODS

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("methods")


def test_the_tables_are_those_of_the_results(script: ModuleType) -> None:
    assert script.filled(PAGE, script.TABLES) == PAGE, "run: python scripts/methods.py"


@pytest.fixture
def recorded(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Any], bool]], None]:
    """Takes which rows are current, by key, and gives the script all rows there should be, at 90 where current and else at 12.34."""
    rows = script.methods_rows
    recipe, digest = rows.methods_retrained.told(rows.methods_retrained.RECIPE), rows.sources_digest()

    def made(key: Any, same: bool) -> list[dict[str, Any]]:
        dense = key.method == "dense"
        row = {"net": key.net, "method": "" if dense else key.method, "permuted": key.permuted, "seed": key.seed}
        row |= {"value": 90.0 if same else 12.34, "sources_digest": digest if same else "of another code", "data": "", "metric": "accuracy"}
        row |= {"cpu_seconds": 1.0, "peak_bytes": 0, "mean_output_error": None, "machine": {"cpu": "one", "cores": 2, "torch": "2.13"}}
        row |= {} if key.seed is None else {"recipe": recipe, "steps": 1, "images": 1, "device": "CPU"}
        texts = key.net == "MiniLM-L6"
        variants = ["retrained"] if key.seed is not None else ["dense"] if dense else ["2:4 one-shot", script.REESTIMATED][: 2 - texts]
        return [row | {"variant": variant} for variant in variants]

    def record(is_current: Callable[[Any], bool]) -> None:
        keys = rows.wanted(list(rows.NETWORKS), True, True)
        result = script.read(ROOT / "results" / "cpu" / "methods.json")
        path = tmp_path / "methods.json"
        path.write_text(json.dumps(result | {"rows": [row for key in keys for row in made(key, is_current(key))]}))
        monkeypatch.setattr(script, "METHODS", path)

    return record


def told(script: ModuleType) -> str:
    """The advice without its line breaks."""
    return str(script.advice()).replace("\n  ", " ")


def test_rows_of_another_code_are_left_out_and_named(script: ModuleType, recorded: Callable[[Callable[[Any], bool]], None]) -> None:
    recorded(lambda key: key.net != "ResNet-20" and (key.net, key.method, key.permuted) != ("ResNet-56", "wanda", False))
    tables, advice = script.methods_tables(), told(script)
    assert "12.3" not in tables + advice
    assert re.findall(r"^\*\*(.*?)\*\*, ", tables, re.MULTILINE) == ["ResNet-32", "ResNet-44", "ResNet-56", "MiniLM-L6"]
    assert "| method | ResNet-56 one-shot | ResNet-56 retrained |" in tables
    (named,) = re.findall(r"^Not measured with the code of today: (.*)\.$", tables, re.MULTILINE)
    assert {"ResNet-20 (plain order, reordered, retrained)", "ResNet-56 (plain order of wanda)"} <= set(named.split("; "))
    assert len(re.findall(r"^\| `wanda` ", tables, re.MULTILINE)) == 3
    # ResNet-56 is not told of while a row of it is missing, but for what was retrained.
    assert "ResNet-20" not in advice
    assert "points in ResNet-32 and" in advice
    assert advice.count("ResNet-56") == 1


def test_a_page_without_rows_says_so_and_names_no_number(script: ModuleType, recorded: Callable[[Callable[[Any], bool]], None]) -> None:
    recorded(lambda key: False)
    tables, advice = script.methods_tables(), told(script)
    assert "|" not in tables
    for net in script.methods_rows.NETWORKS:
        assert f"{net} (plain order, reordered" in tables
    assert not re.search(r"\d (points )?in |\d\.\d", advice)
    assert [line[:28] for line in advice.splitlines() if line.startswith("- ")] == [
        line[:28] for line in PAGE.splitlines() if line.startswith("- **")
    ]


def test_a_network_of_which_too_little_is_measured_has_no_table(
    script: ModuleType, recorded: Callable[[Callable[[Any], bool]], None]
) -> None:
    recorded(lambda key: key.method == "dense" or (key.method, key.seed) == ("magnitude", 0))
    assert "**ResNet-20**" not in script.methods_tables()
    assert "| `magnitude` | – | 90.00 | – | 90.00 |" in script.methods_tables()
    assert "ended above" not in told(script)


def test_rows_of_another_recipe_are_left_out(script: ModuleType, recorded: Callable[[Callable[[Any], bool]], None]) -> None:
    recorded(lambda key: True)
    assert "After a short retraining" in script.methods_tables()
    changed = script.read(script.METHODS)
    for row in changed["rows"]:
        if row["seed"] is not None:
            row["recipe"] = {**row["recipe"], "lr": 1.0}
    script.METHODS.write_text(json.dumps(changed))
    assert "After a short retraining" not in script.methods_tables()
    assert "ended above" not in told(script)


def test_what_holds_in_both_orders_is_said_of_networks_measured_in_both(
    script: ModuleType, recorded: Callable[[Callable[[Any], bool]], None]
) -> None:
    recorded(lambda key: True)
    assert "reordered alike" in told(script)
    recorded(lambda key: not key.permuted or key.net != "ResNet-44")
    assert "reordered alike" not in told(script)


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


@pytest.mark.parametrize("permuted", [False, True])
def test_what_the_advice_says_of_batch_norm_is_what_was_measured(script: ModuleType, permuted: bool) -> None:
    assert set(script.KEEPING) == METHODS.keys() - UPDATING
    measured = script.one_shot(script.read(script.METHODS), permuted)
    assert {"ResNet-20", "ResNet-56"} <= measured.keys()
    for net, values in measured.items():
        for method in METHODS:
            assert (script.gained(values, method) > 0) == (method in script.KEEPING), (net, method)


def test_what_the_advice_says_without_training_and_after_a_little_is_what_was_measured(script: ModuleType) -> None:
    recorded = script.read(script.METHODS)
    rows = [row for row in recorded["rows"] if row["seed"] is None and row["variant"] == "2:4 one-shot" and not row["permuted"]]
    for net in {row["net"] for row in rows}:
        own = {row["method"]: row for row in rows if row["net"] == net}
        assert max(own, key=lambda method: own[method]["value"]) == "alps", net
        errors = {method: row["mean_output_error"] for method, row in own.items() if row["mean_output_error"] is not None}
        assert min(errors, key=lambda method: errors[method]) == "alps", net
    for net in {row["net"] for row in recorded["rows"] if row["seed"] is not None}:
        sparsegpt, magnitude = (statistics.mean(script.retrained(recorded, net, method)) for method in ("sparsegpt", "magnitude"))
        assert sparsegpt > magnitude, net


def test_cpu_seconds_name_the_machines_of_the_rows_they_come_from(script: ModuleType) -> None:
    def row(net: str, cpu: str, method: str = "wanda", permuted: bool = False, seed: int | None = None) -> dict[str, Any]:
        return {"net": net, "method": method, "permuted": permuted, "seed": seed, "machine": {"cpu": cpu, "cores": 2, "torch": "2.13"}}

    rows = [row("A", "one", ""), row("A", "two"), row("A", "two"), row("A", "one", permuted=True), row("A", "one", seed=0)]
    recorded = {"rows": [*rows, row("B", "one"), row("B", "two", "alps")], "machine": {"cpu": "head", "torch": "0"}}
    assert script.seconds_of(recorded) == "A on two, torch 2.13; B on one, torch 2.13 and two, torch 2.13"


def test_memory_is_told_with_its_scatter(script: ModuleType) -> None:
    def row(net: str, method: str, mib: int, permuted: bool = False, seed: int | None = None) -> dict[str, Any]:
        return {"net": net, "method": method, "permuted": permuted, "seed": seed, "peak_bytes": mib << 20}

    rows = [row("A", "wanda", 100), row("A", "ria", 340), row("A", "ria", 900, permuted=True), row("A", "alps", 2000), row("B", "wanda", 1)]
    assert script.memory_scatter({"rows": rows}).endswith("`wanda` and `ria`, which hold the same, lie up to 240 MiB apart.")
    assert script.memory_scatter({"rows": rows[2:]}) == ""


def test_every_row_names_its_machine_and_retrained_ones_that_of_their_device(script: ModuleType) -> None:
    rows = script.read(script.METHODS)["rows"]
    assert all(row["machine"].keys() == {"cpu", "cores", "torch"} for row in rows)
    assert all(("+cu" in row["machine"]["torch"]) == (row["device"] != "CPU") for row in rows if row["seed"] is not None)


def test_the_memory_of_7b_is_told_with_the_error_at_the_measured_shape(script: ModuleType) -> None:
    gib = 1 << 30
    told = script.memory_error(2 * gib, 4 * gib, gib, 4 * gib)
    assert "take 4.00 GiB of the device by the computation" in told
    assert "lies +100 % from what the GPU's allocator measured and -50 % from the CPU's peak" in told
    assert told.endswith("Corrected by the GPU's measurement: 2.00 GiB.")
    row = {"masks_bytes": 30, "values_bytes": 60, "layers": 3, "activations_bytes": 5, "host_peak_bytes": 1065}
    assert script.host_peak(row) == 1000
    gpu, cpu = (script.read(path)["rows"][0] for path in (script.GPU_MEMORY, script.MEMORY))
    assert f"on a GPU (allocator) | {gpu['device_peak_bytes'] / gib:.2f} |" in PAGE
    assert f"on a CPU (resident memory above the rest) | {script.host_peak(cpu) / gib:.2f} |" in PAGE


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
