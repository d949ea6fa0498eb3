"""Writes the tables of docs/methods.md from results/cpu/methods.json and results/cpu/blocks-memory.json: `python scripts/methods.py`."""

import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from twofour.files import write_text

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "methods.md"
METHODS = ROOT / "results" / "cpu" / "methods.json"
MEMORY = ROOT / "results" / "cpu" / "blocks-memory.json"
REESTIMATED = "2:4 one-shot, batch-norm re-estimated"


def read(path: Path) -> dict[str, Any]:
    """Return a results file."""
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value


def cell(rows: list[dict[str, Any]], permuted: bool, variant: str) -> str:
    """Return the metric of one row, or a dash."""
    found = [row["value"] for row in rows if row["permuted"] == permuted and row["variant"] == variant]
    return f"{found[0]:.2f}" if found else "–"


def network_table(net: str, recorded: dict[str, Any]) -> str:
    """Return one network's table: a row a method."""
    rows = [row for row in recorded["rows"] if row["net"] == net and row["seed"] is None]
    dense = next(row for row in rows if row["variant"] == "dense")
    has_norm = any(row["variant"] == REESTIMATED for row in rows)
    reordered = any(row["permuted"] for row in rows)
    columns = ["as trained", "batch-norm re-estimated"] if has_norm else [""]
    heads = [", ".join(filter(None, (order, c))) for order in ("plain order", "reordered")[: 1 + reordered] for c in columns]
    unit = "%" if dense["metric"] == "accuracy" else "× 100"
    lines = [f"**{net}**, {dense['data']}, {dense['metric']} {unit}; dense {dense['value']:.2f}:", ""]
    lines += [f"| method | {' | '.join(heads)} | CPU seconds | memory, MiB | output error |", "|---" * (len(heads) + 4) + "|"]
    for method in dict.fromkeys(row["method"] for row in rows if row["method"]):
        own = [row for row in rows if row["method"] == method]
        plain = next(row for row in own if not row["permuted"])
        variants = ["2:4 one-shot", REESTIMATED] if has_norm else ["2:4 one-shot"]
        cells = [cell(own, permuted, variant) for permuted in (False, True)[: 1 + reordered] for variant in variants]
        error = "–" if plain["mean_output_error"] is None else f"{100 * plain['mean_output_error']:.2f} %"
        lines.append(f"| `{method}` | {' | '.join(cells)} | {plain['cpu_seconds']:.1f} | {plain['peak_bytes'] / 2**20:.0f} | {error} |")
    return "\n".join(lines)


def retrained_table(recorded: dict[str, Any]) -> list[str]:
    """Return the table of the networks that were retrained and how, or nothing where none was."""
    rows = [row for row in recorded["rows"] if row["seed"] is not None]
    if not rows:
        return []
    nets = list(dict.fromkeys(row["net"] for row in rows))
    heads = [head for net in nets for head in (f"{net} one-shot", f"{net} retrained")]
    lines = ["**After a short retraining** with the mask held, CIFAR-10 test, accuracy %, mean ± standard deviation over seeds:", ""]
    lines += [f"| method | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = []
        for net in nets:
            before = [row for row in recorded["rows"] if row["net"] == net and row["method"] == method and row["seed"] is None]
            values = [row["value"] for row in rows if row["net"] == net and row["method"] == method]
            cells += [cell(before, False, "2:4 one-shot" if method else "dense"), spread(values)]
        name = f"`{method}`" if method else "dense, the same training"
        lines.append(f"| {name} | {' | '.join(cells)} |")
    recipe, seeds = rows[0]["recipe"], len({row["seed"] for row in rows})
    lines += [
        "",
        f"{rows[0]['steps']} steps of {recipe['batch']} out of {rows[0]['images']:,} training images with crops and flips, learning rate "
        f"{recipe['lr']:g} falling to 0, soft labels of the dense network at weight {recipe['distill']:g}; {seeds} seeds; plain order; "
        f"{', '.join(dict.fromkeys(row['device'] for row in rows))}.",
    ]
    return ["\n".join(lines)]


def spread(values: list[float]) -> str:
    """Return mean ± standard deviation, a dash for no value."""
    if len(values) < 2:
        return f"{values[0]:.2f}" if values else "–"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def methods_tables() -> str:
    """Return the tables of every network recorded, and where they were measured."""
    recorded = read(METHODS)
    nets = dict.fromkeys(row["net"] for row in recorded["rows"])
    machine = recorded["machine"]
    where = f"{machine['cpu']}, one thread, torch {machine['torch']}; {recorded['date']}; `{recorded['command']}`"
    calibration = "; ".join(f"{name}: {text}" for name, text in recorded["calibration"].items() if isinstance(text, str))
    return "\n\n".join(
        [*(network_table(net, recorded) for net in nets), *retrained_table(recorded), f"Calibration: {calibration}. {where}."]
    )


def memory_table() -> str:
    """Return the memory of block-by-block pruning: measured for the 1B shape, computed for 7B."""
    recorded = read(MEMORY)
    gib = lambda count: f"{count / 2**30:.2f}"  # noqa: E731 - a unit
    lines = [
        "| GiB | " + " | ".join(f"{row['shape']} shape" for row in recorded["rows"]) + " |",
        "|---" * (1 + len(recorded["rows"])) + "|",
    ]
    names = {"block": "the block, bf16", "statistics": "XᵀX of its layers", "choosing": "choosing, the largest layer", "batch": "one batch"}
    for key, name in {**names, "peak": "**device peak, computed**"}.items():
        lines.append(f"| {name} | " + " | ".join(gib(row["expected"][key]) for row in recorded["rows"]) + " |")
    measured = recorded["rows"][0]
    device = measured["device_peak_bytes"]
    # While the last block is chosen, the results of all others are there.
    finished = (measured["masks_bytes"] + measured["values_bytes"]) * (measured["layers"] - 1) // measured["layers"]
    above = measured["host_peak_bytes"] - finished - measured["activations_bytes"]
    peak, how = (device, "GPU allocator") if device is not None else (above, "resident memory above model, finished blocks and activations")
    lines.append(f"| **peak, measured** ({how}) | {gib(peak)} | – |")
    for key, name in (("model_bytes", "host: model"), ("activations_bytes", "host: activations"), ("values_bytes", "host: new values")):
        lines.append(f"| {name} | " + " | ".join(gib(row[key]) for row in recorded["rows"]) + " |")
    lines.append("| host: masks | " + " | ".join(gib(row["masks_bytes"]) for row in recorded["rows"]) + " |")
    machine = recorded["machine"]
    lines += [
        "",
        f"{measured['layers']} layers, {measured['sequences']} sequences of {measured['tokens']} tokens measured; 128 of 2,048 for 7B. ",
    ]
    lines[-1] += f"torch {machine['torch']}; {recorded['date']}; `{recorded['command']}`."
    return "\n".join(lines)


TABLES: dict[str, Callable[[], str]] = {"methods": methods_tables, "memory": memory_table}


def filled(page: str) -> str:
    """Return the page's text with each table between its markers."""
    for name, make in TABLES.items():
        table = make()
        pattern = rf"(<!-- {name} table -->\n).*?(<!-- /{name} table -->)"
        page, count = re.subn(pattern, lambda m, table=table: f"{m[1]}{table}\n{m[2]}", page, flags=re.DOTALL)
        assert count == 1, f"docs/methods.md has {count} places for the {name} table"
    return page


if __name__ == "__main__":
    write_text(PAGE, filled(PAGE.read_text(encoding="utf-8")))
