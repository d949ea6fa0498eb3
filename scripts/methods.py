"""Writes the tables and the advice of docs/methods.md from the results of methods and of blocks-memory: `python scripts/methods.py`.

Rows whose sources or recipe have changed since are left out, and the page names what is then not measured.
"""

import json
import statistics
import sys
import textwrap
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

from pages import filled

from twofour.files import write_text

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "evidence"))
import methods_rows  # noqa: E402

PAGE = ROOT / "docs" / "methods.md"
METHODS = ROOT / "results" / "cpu" / "methods.json"
MEMORY = ROOT / "results" / "cpu" / "blocks-memory.json"
GPU_MEMORY = ROOT / "results" / "nvidia-h200" / "blocks-memory.json"
REESTIMATED = "2:4 one-shot, batch-norm re-estimated"
# The methods that leave the kept values as they are.
KEEPING = ("magnitude", "wanda", "ria", "sparsegpt-mask")


def read(path: Path) -> dict[str, Any]:
    """Return a results file."""
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value


def current() -> dict[str, Any]:
    """Return the results of the methods with the rows of today's code and recipe alone."""
    recorded, digest = read(METHODS), methods_rows.sources_digest()
    return recorded | {"rows": [row for row in recorded["rows"] if methods_rows.is_current(row, digest)]}


def missing(recorded: dict[str, Any]) -> list[str]:
    """Return what there is no row of: of each network, whole parts by their names, else the methods that a part lacks."""
    have = {methods_rows.Key.of(row) for row in recorded["rows"]}
    found: list[str] = []
    for net in methods_rows.NETWORKS:
        parts: dict[str, list[methods_rows.Key]] = {}
        for key in methods_rows.wanted([net], True, True):
            parts.setdefault("retrained" if key.seed is not None else "reordered" if key.permuted else "plain order", []).append(key)
        lacks = {part: [key for key in keys if key not in have] for part, keys in parts.items()}
        names = [
            part if len(lacks[part]) == len(keys) else f"{part} of {listed(list(dict.fromkeys(key.method for key in lacks[part])))}"
            for part, keys in parts.items()
            if lacks[part]
        ]
        found += [f"{net} ({', '.join(names)})"] if names else []
    return found


def cell(rows: list[dict[str, Any]], permuted: bool, variant: str) -> str:
    """Return the metric of one row, or a dash."""
    found = [row["value"] for row in rows if row["permuted"] == permuted and row["variant"] == variant]
    return f"{found[0]:.2f}" if found else "–"


def network_table(net: str, recorded: dict[str, Any]) -> str:
    """Return one network's table: a row a method measured in plain order; empty where the dense network or every method is missing."""
    rows = [row for row in recorded["rows"] if row["net"] == net and row["seed"] is None]
    dense = next((row for row in rows if row["variant"] == "dense"), None)
    methods = dict.fromkeys(row["method"] for row in rows if row["method"] and not row["permuted"])
    if dense is None or not methods:
        return ""
    has_norm = any(row["variant"] == REESTIMATED for row in rows)
    reordered = any(row["permuted"] for row in rows)
    columns = ["as trained", "batch-norm re-estimated"] if has_norm else [""]
    heads = [", ".join(filter(None, (order, c))) for order in ("plain order", "reordered")[: 1 + reordered] for c in columns]
    unit = "%" if dense["metric"] == "accuracy" else "× 100"
    lines = [f"**{net}**, {dense['data']}, {dense['metric']} {unit}; dense {dense['value']:.2f}:", ""]
    lines += [f"| method | {' | '.join(heads)} | CPU seconds | memory, MiB | output error |", "|---" * (len(heads) + 4) + "|"]
    for method in methods:
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


def seconds_of(recorded: dict[str, Any]) -> str:
    """Return the processors and torch versions that each network's CPU seconds come from."""
    nets: dict[str, dict[str, None]] = {}
    for row in recorded["rows"]:
        if row["seed"] is None and row["method"] and not row["permuted"]:
            of_net = nets.setdefault(row["net"], {})
            of_net[f"{row['machine']['cpu']}, torch {row['machine']['torch']}"] = None
    return "; ".join(f"{net} on {' and '.join(machines)}" for net, machines in nets.items())


def memory_scatter(recorded: dict[str, Any]) -> str:
    """Return what the memory is and how far apart it came out for the two methods that hold the same; nothing where both are missing."""
    peaks = {
        (row["net"], row["method"]): row["peak_bytes"]
        for row in recorded["rows"]
        if row["method"] and not row["permuted"] and row["seed"] is None
    }
    apart = [abs(peak - peaks[net, "ria"]) for (net, method), peak in peaks.items() if method == "wanda" and (net, "ria") in peaks]
    if not apart:
        return ""
    return (
        " Memory: resident at its peak above where it began, with what the allocator keeps of memory given back; `wanda` and `ria`, which "
        f"hold the same, lie up to {max(apart) / 2**20:.0f} MiB apart."
    )


def methods_tables() -> str:
    """Return the tables of every network recorded, and where they were measured."""
    recorded = current()
    nets = dict.fromkeys(row["net"] for row in recorded["rows"])
    seconds = f" CPU seconds, one thread: {seconds_of(recorded)}." if recorded["rows"] else ""
    calibration = "; ".join(f"{name}: {text}" for name, text in recorded["calibration"].items() if isinstance(text, str))
    told = f"Calibration: {calibration}.{seconds}{memory_scatter(recorded)} {recorded['date']}; `{recorded['command']}`."
    left = [f"Not measured with the code of today: {'; '.join(missing(recorded))}."] if missing(recorded) else []
    return "\n\n".join(filter(None, [*(network_table(net, recorded) for net in nets), *retrained_table(recorded), *left, told]))


def memory_table() -> str:
    """Return the memory of block-by-block pruning: measured for the 1B shape on a GPU and on a CPU, computed for 7B, and how far off."""
    gpu, cpu = read(GPU_MEMORY), read(MEMORY)
    on_gpu, on_cpu, seven = gpu["rows"][0], cpu["rows"][0], cpu["rows"][1]
    assert on_gpu["expected"] == on_cpu["expected"], "the two results are of other shapes; measure them with the same options"
    shapes = (on_cpu, seven)
    lines = ["| GiB | " + " | ".join(f"{row['shape']} shape" for row in shapes) + " |", "|---" * (1 + len(shapes)) + "|"]
    names = {"block": "the block, bf16", "statistics": "XᵀX of its layers", "batch": "one batch"}
    names |= {"choosing": "or choosing, the layer that needs most", "statistics_left": "with its XᵀX and those still to come"}
    for key, name in {**names, "peak": "**device peak, computed**"}.items():
        lines.append(f"| {name} | " + " | ".join(gib(row["expected"][key]) for row in shapes) + " |")
    peaks = {"GPU (allocator)": on_gpu["device_peak_bytes"], "CPU (resident memory above the rest)": host_peak(on_cpu)}
    lines += [f"| **peak, measured** on a {where} | {gib(peak)} | – |" for where, peak in peaks.items()]
    names = {"model_bytes": "model", "activations_bytes": "activations", "values_bytes": "new values", "masks_bytes": "masks"}
    lines += [f"| host: {name} | " + " | ".join(gib(row[key]) for row in shapes) + " |" for key, name in names.items()]
    lines += [f"| host, together | {' | '.join(gib(sum(row[key] for key in names)) for row in shapes)} |"]
    return "\n".join(
        [*lines, "", memory_error(on_cpu["expected"]["peak"], seven["expected"]["peak"], *peaks.values()), "", origin(gpu, cpu)]
    )


def gib(count: float) -> str:
    """Return a number of bytes in GiB."""
    return f"{count / 2**30:.2f}"


def host_peak(row: dict[str, Any]) -> int:
    """Return the resident memory at its peak above the model, the blocks finished by then and the activations, in bytes."""
    # While the last block is chosen, the results of all others are there.
    finished = (row["masks_bytes"] + row["values_bytes"]) * (row["layers"] - 1) // row["layers"]
    return int(row["host_peak_bytes"] - finished - row["activations_bytes"])


def memory_error(one: int, seven: int, gpu: int, cpu: int) -> str:
    """Return what a 7B run is expected to take, given the computed peaks of both shapes and the measured ones of the 1B shape."""
    off = [100 * (one / measured - 1) for measured in (gpu, cpu)]
    return (
        f"A 7B run is expected to take {gib(seven)} GiB of the device by the computation, which at the 1B shape lies {off[0]:+.0f} % from "
        f"what the GPU's allocator measured and {off[1]:+.0f} % from the CPU's peak: it counts tensors only, not the workspaces of "
        "libraries, nor what the host's allocator keeps of memory given back. Corrected by the GPU's measurement: "
        f"{gib(seven * gpu / one)} GiB."
    )


def origin(gpu: dict[str, Any], cpu: dict[str, Any]) -> str:
    """Return what was measured, and by which commands."""
    row, seven = cpu["rows"]
    parts = [f"torch {r['machine']['torch']}, {r['rows'][0]['seconds']:,.0f} s; {r['date']}; `{r['command']}`" for r in (gpu, cpu)]
    measured = f"{row['layers']} layers, {row['sequences']} sequences of {row['tokens']:,} tokens measured"
    return f"{measured}; {seven['sequences']} of {seven['tokens']:,} for 7B. GPU: {parts[0]}. CPU: {parts[1]}."


def one_shot(recorded: dict[str, Any], permuted: bool = False) -> dict[str, dict[tuple[str, str], float]]:
    """Return, for every network with batch-norm measured in this order of channels, (method, variant) -> metric; the dense one is ""."""
    rows = [row for row in recorded["rows"] if row["seed"] is None and row["permuted"] == permuted]
    nets = dict.fromkeys(row["net"] for row in rows if row["variant"] == REESTIMATED)
    return {net: {(row["method"], row["variant"]): row["value"] for row in rows if row["net"] == net} for net in nets}


def complete(recorded: dict[str, Any], permuted: bool = False) -> dict[str, dict[tuple[str, str], float]]:
    """Return of `one_shot` the networks of which every pruned row is there, and in plain order the dense one."""
    needed = set(product((*KEEPING, "sparsegpt", "alps"), ("2:4 one-shot", REESTIMATED))) | (set() if permuted else {("", "dense")})
    return {net: values for net, values in one_shot(recorded, permuted).items() if needed <= values.keys()}


def retrained(recorded: dict[str, Any], net: str, method: str) -> list[float]:
    """Return the metric after the short retraining, one a seed."""
    return [row["value"] for row in recorded["rows"] if row["seed"] is not None and row["net"] == net and row["method"] == method]


def gained(values: dict[tuple[str, str], float], method: str) -> float:
    """Return by how much re-estimated batch-norm is better."""
    return values[method, REESTIMATED] - values[method, "2:4 one-shot"]


def listed(parts: list[str]) -> str:
    """Return "a, b and c"."""
    return " and ".join(filter(None, (", ".join(parts[:-1]), *parts[-1:])))


def advice() -> str:
    """Return which method to use when. What it claims of the numbers, a test holds against every row."""
    recorded = current()
    # A network tells nothing while rows of it are missing.
    plain = complete(recorded)
    trained = {
        net: [retrained(recorded, net, method) for method in ("sparsegpt", "magnitude")]
        for net in dict.fromkeys(row["net"] for row in recorded["rows"] if row["seed"] is not None)
    }
    means = {net: [statistics.mean(values) for values in both] for net, both in trained.items() if all(both)}
    above = [f"{after - other:.1f} points in {net}" for net, (after, other) in means.items()]
    kept = [f"{values['alps', '2:4 one-shot']:.2f} of {values['', 'dense']:.2f} in {net}" for net, values in plain.items()]
    points = {net: [gained(values, method) for method in KEEPING] for net, values in plain.items()}
    gains = [f"{min(some):.0f} to {max(some):.0f} points in {net}" for net, some in points.items()]
    losses = [f"{-gained(values, 'sparsegpt'):.1f} and {-gained(values, 'alps'):.1f} in {net}" for net, values in plain.items()]
    ended = f", which in the last table ended above `magnitude` by {listed(above)}" if above else ""
    kept_least = "which has the smallest output error and in plain order lost least above: without any training it keeps"
    lost = f", {kept_least} {listed(kept)}" if kept else ""
    gained_by = f": in plain order {listed(gains)}" if gains else ""
    alike = ", and reordered alike" if plain.keys() <= complete(recorded, permuted=True).keys() else ""
    lost_by = f", {listed(losses)}{alike}" if losses else ""
    paragraphs = [
        "**You will retrain in full** (the whole training again with the mask held): `magnitude`. It needs no data, and retraining makes "
        f"up for the mask. **You will retrain briefly**: `sparsegpt`{ended}.",
        f"**You will not retrain**: `alps`{lost}. "
        "`sparsegpt` where an eigendecomposition of every layer's XᵀX and up to 300 iterations take too long.",
        f"**Batch-norm** gains from being re-estimated after `magnitude`, `wanda`, `ria` and `sparsegpt-mask`{gained_by}. "
        f"After `sparsegpt` and `alps` it takes points away{lost_by}: their weights already "
        "give what the old statistics describe, and 2,000 images give poorer ones. `prune` does what helps by default; "
        "`reestimate=True` measures it on your network.",
        "**Memory or time is short, or weights must keep their values** (adapters, a merge with other checkpoints): `wanda` or `ria`. "
        "They take little more than a pass over the data, and need one number per input instead of a matrix. That saves memory where "
        "layers are wide; in small networks of images the activations of one batch outweigh all the matrices.",
    ]
    return "\n".join(
        textwrap.fill(f"- {text}", 140, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False) for text in paragraphs
    )


TABLES: dict[str, Callable[[], str]] = {"methods": methods_tables, "memory": memory_table, "advice": advice}


if __name__ == "__main__":
    write_text(PAGE, filled(PAGE.read_text(encoding="utf-8"), TABLES))
