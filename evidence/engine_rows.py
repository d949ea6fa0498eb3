"""The rows of results/GPU/engine.json: which are still good, how new ones join them, what follows from them, and their tables.

Nothing here needs a GPU or torch. A row is one network at one batch size and precision, run one way:
`torch.compile`, `off` (our engine of the dense network, no 2:4 kernels) or `2:4` (our engine of the pruned network).
"""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from twofour.errors import InputError
from twofour.files import write_text
from twofour.timing.gpu import SETTLED

SCHEMA = 1
PEER, OFF, SPARSE = "torch.compile", "off", "2:4"
VARIANTS = (PEER, OFF, SPARSE)
# network: the name that the package resolves, and the batch sizes.
NETWORKS: dict[str, tuple[str, tuple[int, ...]]] = {
    "ResNet-50": ("torchvision:resnet50", (256, 1)),
    "ResNeXt-101_32x8d": ("torchvision:resnext101_32x8d", (256,)),
    "ViT-B/16": ("timm:vit_base_patch16_224", (64,)),
    "MLP-Mixer-B/16": ("timm:mixer_b16_224", (64,)),
    "WideResNet-50-2": ("torchvision:wide_resnet50_2", (256,)),
    "RegNetY-16GF": ("torchvision:regnet_y_16gf", (256,)),
    "MobileNetV2": ("torchvision:mobilenet_v2", (256,)),
    "EfficientNet-B0": ("torchvision:efficientnet_b0", (256,)),
    "ConvNeXt-B": ("torchvision:convnext_base", (256,)),
    "DenseNet-121": ("torchvision:densenet121", (256,)),
}
NO_ROWS = "No measurement of the present kernels is recorded."


@dataclass(frozen=True)
class Group:
    """What is measured together, its variants in turn."""

    net: str
    batch: int
    precision: str

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> "Group":
        """Return the group of a row."""
        return cls(row["net"], row["batch"], row["precision"])

    def __str__(self) -> str:
        return f"{self.net} batch {self.batch} {self.precision}"


def groups(nets: Sequence[str], batches: Sequence[int], precisions: Sequence[str], shard: tuple[int, int] = (1, 1)) -> list[Group]:
    """Return the groups of a shard: networks are dealt out in turn, so that a network's batch sizes stay together.

    Args:
        nets: names of NETWORKS or of what they resolve to; empty: all. batches: replace the networks' own; empty: their own.
        shard: (i, n), the i-th of n, from 1.

    Raises:
        InputError: an unknown network, or no such shard.
    """
    names = {name.lower(): name for name in NETWORKS} | {spec.partition(":")[2]: name for name, (spec, _) in NETWORKS.items()}
    if unknown := [net for net in nets if net.lower() not in names]:
        raise InputError(f"--nets {unknown[0]!r} is unknown, expected one of {sorted(names)}")
    chosen = list(dict.fromkeys(names[net.lower()] for net in nets)) or list(NETWORKS)
    number, of = shard
    if not 1 <= number <= of:
        raise InputError(f"--shard {number}/{of}: expected i/n with i from 1 to n")
    mine = [net for k, net in enumerate(chosen) if k % of == number - 1]
    return [Group(net, batch, precision) for net in mine for batch in batches or NETWORKS[net][1] for precision in precisions]


def parse_shard(text: str) -> tuple[int, int]:
    """Return (i, n) of `i/n`.

    Raises:
        InputError: it is not that.
    """
    parts = text.split("/")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise InputError(f"--shard {text!r}: expected i/n, like 1/2")
    return int(parts[0]), int(parts[1])


def is_stale(row: Mapping[str, Any], sources: Mapping[str, str]) -> bool:
    """Return whether a row ran kernels that have changed since; torch.compile runs none of ours."""
    return row["variant"] != PEER and row["sources"] != dict(sources)


def missing(
    group: Group,
    rows: Sequence[Mapping[str, Any]],
    sources: Mapping[str, str],
    versions: Mapping[str, str],
    *,
    peer: bool = True,
    retry_failed: bool = False,
) -> tuple[str, ...]:
    """Return the variants of a group still to be measured: absent, of other sources or library versions, or (asked for) failed.

    `off` and `2:4` are compared with each other, so both are measured where one is missing.
    """
    good = {
        row["variant"]
        for row in rows
        if Group.of(row) == group
        and not is_stale(row, sources)
        and row["versions"] == dict(versions)
        and not (retry_failed and "error" in row)
    }
    left = {variant for variant in VARIANTS if variant not in good and (peer or variant != PEER)}
    if left & {OFF, SPARSE}:
        left |= {OFF, SPARSE}
    return tuple(variant for variant in VARIANTS if variant in left)


def merged(rows: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return all rows, a new one in the place of an old one of the same group and variant; in the order of networks and variants."""

    def place(row: dict[str, Any]) -> tuple[Any, ...]:
        known = list(NETWORKS)
        net = known.index(row["net"]) if row["net"] in known else len(known)
        return net, row["net"], row["precision"], -row["batch"], VARIANTS.index(row["variant"])

    kept = {(Group.of(row), row["variant"]): row for row in [*rows, *new]}
    return sorted(kept.values(), key=place)


def read(path: Path) -> dict[str, Any]:
    """Return a results file, an empty one where there is none.

    Raises:
        InputError: it holds something else.
    """
    if not path.is_file():
        return {"schema": SCHEMA, "kind": "engine", "rows": []}
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if value["schema"] == SCHEMA and value["kind"] == "engine":
            return value
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{str(path)!r} is no results file ({error!r}), expected what this command wrote; move it away") from error
    raise InputError(f"{str(path)!r} holds {value['kind']!r} results of schema {value['schema']}, expected 'engine' of {SCHEMA}")


def add(path: Path, head: Mapping[str, Any], new: Sequence[dict[str, Any]]) -> None:
    """Write new rows into the file at once, aside and renamed; several processes may do so.

    The head's command gets the networks of all rows, since parts of one measurement name one each.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        rows = merged(read(path)["rows"], new)
        nets = list(dict.fromkeys(row["net"] for row in rows))
        command = head["command"] if set(nets) == set(NETWORKS) else f"{head['command']} --nets {' '.join(nets)}"
        value = {"schema": SCHEMA, "kind": "engine", **head, "command": command, "summary": summary(rows), "rows": rows}
        write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one entry a group: how the engines stand to each other and to torch.compile; None where a row is missing or failed.

    `time_24_over_off` is the ratio of times; `never_slower` says that it is at most 1 + `noise`, the larger of the two spreads
    (interquartile range over median) and of what the protocol calls settled.
    """
    found = []
    for group, members in itertools.groupby(rows, Group.of):
        by = {row["variant"]: row for row in members}
        ran = {variant: row for variant, row in by.items() if "error" not in row}
        peer, off, sparse = (ran.get(variant) for variant in VARIANTS)
        entry: dict[str, Any] = {"net": group.net, "batch": group.batch, "precision": group.precision}
        entry["time_24_over_off"] = ratio = sparse["ms"] / off["ms"] if off and sparse else None
        entry["noise"] = noise = max(off["spread"], sparse["spread"], SETTLED) if off and sparse else None
        entry["never_slower"] = None if ratio is None or noise is None else ratio <= 1 + noise
        entry["off_over_torch_compile"] = peer["ms"] / off["ms"] if peer and off else None
        entry["sparse_over_torch_compile"] = peer["ms"] / sparse["ms"] if peer and sparse else None
        entry["failed"] = {variant: row["error"] for variant, row in by.items() if "error" in row}
        found.append(entry)
    return found


def _shown(recorded: Mapping[str, Any], sources: Mapping[str, str]) -> list[tuple[Group, dict[str, dict[str, Any]]]]:
    """The groups of which our engines have rows of the present kernels, with these rows and torch.compile's."""
    fresh = [row for row in recorded["rows"] if not is_stale(row, sources) and "error" not in row]
    grouped = [(group, {row["variant"]: row for row in members}) for group, members in itertools.groupby(fresh, Group.of)]
    return [(group, by) for group, by in grouped if OFF in by and SPARSE in by]


def _speed(row: Mapping[str, Any] | None) -> str:
    """Images a second; milliseconds for a single image."""
    if row is None:
        return "–"
    return f"{row['ms']:.3f} ms" if row["batch"] == 1 else f"{row['items_per_s']:,.0f}"


def _millijoules(row: Mapping[str, Any] | None) -> str:
    return "–" if row is None or row["joules_per_item"] is None else f"{1e3 * row['joules_per_item']:.2f}"


def _where(shown: Sequence[tuple[Group, dict[str, dict[str, Any]]]], recorded: Mapping[str, Any]) -> str:
    """Where and when the rows were measured, by what command."""
    rows = [row for _, by in shown for row in by.values()]
    machines = dict.fromkeys(f"{row['gpu']}, driver {row['driver']}, power limit {row['power_limit_w']:.0f} W" for row in rows)
    libraries = dict.fromkeys(", ".join(f"{name} {version}" for name, version in row["versions"].items() if version) for row in rows)
    return f"{'; '.join(machines)}; {'; '.join(libraries)}; {_days(rows, recorded)}; `{recorded['command']}`."


def _days(rows: Sequence[Mapping[str, Any]], recorded: Mapping[str, Any]) -> str:
    """The days of measuring; those of torch.compile, whose rows stay when our kernels change, apart where they are others."""
    days: dict[bool, set[str]] = {False: set(), True: set()}
    for row in rows:
        days[row["variant"] == PEER].add(row.get("date", recorded["date"])[:10])
    ours, peer = (", ".join(sorted(days[is_peer])) for is_peer in (False, True))
    return ours if peer in ("", ours) else f"{ours}, {PEER} {peer}"


def short_table(recorded: Mapping[str, Any], sources: Mapping[str, str]) -> str:
    """Return the README's table, or a sentence where no row is of the present kernels."""
    shown = _shown(recorded, sources)
    if not shown:
        return NO_ROWS
    lines = [
        "| images a second (batch 1: time) | batch | torch.compile | engine, dense | engine, 2:4 | 2:4 over torch.compile | mJ an image |"
    ]
    lines.append("|---" * 7 + "|")
    for group, by in shown:
        over = by[PEER]["ms"] / by[SPARSE]["ms"] if PEER in by else math.nan
        times = "–" if math.isnan(over) else f"**{over:.2f}**"
        name = group.net if group.precision == "fp16" else f"{group.net}, {group.precision}"
        speeds = " | ".join(_speed(by.get(variant)) for variant in VARIANTS)
        energy = f"{_millijoules(by.get(PEER))} → {_millijoules(by[SPARSE])}"
        lines.append(f"| {name} | {group.batch} | {speeds} | {times} | {energy} |")
    return "\n".join([*lines, "", _where(shown, recorded)])


def full_table(recorded: Mapping[str, Any], sources: Mapping[str, str]) -> str:
    """Return every row of the present kernels, and what failed; a sentence where there is none."""
    shown = _shown(recorded, sources)
    lines = []
    if shown:
        heads = ("network", "run", "ms ± spread", "n", "images/s", "mJ/image", "MHz", "2:4 layers", "activations, MB (bound)")
        heads += ("error, torch's own", "top-1 equal", "build, s: first, cached", "load, s")
        lines += ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
        for group, by in shown:
            lines += [_full_row(group, by[variant]) for variant in VARIANTS if variant in by]
        lines += ["", _where(shown, recorded)]
    failed = [row for row in recorded["rows"] if "error" in row and not is_stale(row, sources)]
    if failed:
        lines += ["", "Failed:", ""] if lines else ["Failed:", ""]
        lines += [f"- {Group.of(row)}, {row['variant']}: {row['error']}" for row in failed]
    return "\n".join(lines) or NO_ROWS


def _full_row(group: Group, row: Mapping[str, Any]) -> str:
    agreement = row["agreement"]
    cells = [
        f"{group.net}, {group.batch}, {group.precision}",
        row["variant"],
        f"{row['ms']:.3f} ± {100 * row['spread']:.1f} %" + ("" if row["is_stable"] else " (unstable)"),
        f"{row['n']}",
        f"{row['items_per_s']:,.0f}",
        _millijoules(row),
        f"{row['clock_mhz']:.0f}",
        f"{row['layers_24']} of {row['layers']}" if "layers" in row else "–",
        f"{row['peak_bytes'] / 1e6:.1f} ({row['bound_bytes'] / 1e6:.1f})" if "peak_bytes" in row else "–",
        f"{agreement['error']:.1e}, {agreement['torch_error']:.1e}",
        f"{100 * agreement['top1']:.1f} %",
        f"{_seconds(row.get('build_first_s'))}, {_seconds(row.get('build_cached_s'))}" if "build_cached_s" in row else "–",
        _seconds(row.get("load_s")),
    ]
    return "| " + " | ".join(cells) + " |"


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"
