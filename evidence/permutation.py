"""What channel permutation finds, keeps and buys; every part writes or extends one file of results.

    python evidence/permutation.py search results/cpu/permutation.json
    python evidence/permutation.py networks results/cpu/permutation-networks.json --count 20000
    python evidence/permutation.py architectures results/cpu/permutation-architectures.json --table docs/permutation-architectures.md
    python evidence/permutation.py gains results/cpu/accuracy-permutation.json --data FOLDER

`search` times the search on two random matrices, ten seeds, one core. `networks` permutes random networks at random and compares them with
themselves. `networks` and `architectures` use `--jobs` processes and go on where an earlier call of the same sources ended. `gains` needs
FOLDER with `cifar10/` and `resnet-cifar10/` as described in `accuracy_oneshot.py`.
"""

import argparse
import ast
import copy
import dataclasses
import datetime
import hashlib
import json
import os
import platform
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress, TimeElapsedColumn

import twofour
from twofour.pruning.permutation import coverage, permute
from twofour.pruning.permutation.search import efficacy_percent, search
from twofour.pruning.permutation.trial import trial

CHUNK = 100  # random networks of one seed
CALIBRATION_ITEMS = 250


def imported(root: Path, name: str) -> set[str]:
    """Return the modules of a package that one of them imports, itself included, through whatever it imports."""
    found, left = set(), [name]
    while left:
        name = left.pop()
        if name in found or not (root / f"{name}.py").is_file():
            continue
        found.add(name)
        for node in ast.walk(ast.parse((root / f"{name}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("twofour.pruning.permutation"):
                left += [node.module.rpartition(".")[2], *(alias.name for alias in node.names)]
    return found


def heading(kind: str) -> dict[str, Any]:
    """The fields that every results file has."""
    root = Path(twofour.__file__).parent / "pruning" / "permutation"
    # Random networks are shuffled, not searched: only what the trial imports bears on them.
    used = sorted(imported(root, "trial") if kind == "permutation networks" else (f.stem for f in root.glob("*.py")))
    digest = hashlib.sha256(b"".join((root / f"{name}.py").read_bytes() for name in used)).hexdigest()[:16]
    return {
        "schema": 1,
        "kind": kind,
        "machine": {"cpu": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__, "twofour": twofour.__version__},
        "date": datetime.date.today().isoformat(),
        "command": "python " + " ".join(sys.argv),
        "sources_digest": digest,
    }


def write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def measure_search(path: Path, seeds: int) -> None:
    cases = [
        ("RandomState(1).rand", np.random.RandomState(1).rand(128, 64), [0.2, 2.0], seeds),
        ("RandomState(0).randn", np.random.RandomState(0).randn(2048, 2048), [60.0], seeds),
    ]
    for warm in (64, 512):
        search(np.random.RandomState(0).rand(warm, 8).astype(np.float32), seconds=0.1)
    rows = []
    for name, weight, budgets, count in cases:
        columns = np.ascontiguousarray(np.abs(weight).T.astype(np.float32))
        for budget in budgets:
            for seed in range(count):
                started, processor = time.perf_counter(), time.process_time()
                found = search(columns, seed=seed, seconds=budget, cut=False)
                rows.append(
                    {"matrix": name, "rows": weight.shape[0], "columns": weight.shape[1], "method": "twofour", "budget_seconds": budget}
                    | {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - processor, "seed": seed}
                    | {"efficacy_percent": efficacy_percent(weight, found.order), "device": "cpu, one core"}
                )
    write(path, heading("permutation") | {"rows": rows})


def earlier_rows(path: Path, kind: str) -> list[dict[str, Any]]:
    """Return the rows of an interrupted call: those of a file that the present sources wrote."""
    if not path.exists():
        return []
    content = json.loads(path.read_text())
    return list(content["rows"]) if content["sources_digest"] == heading(kind)["sources_digest"] else []


def networks_of_seed(seed: int, count: int) -> dict[str, Any]:
    """Return the outcome of `count` random networks."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    return {"seed": seed, **dataclasses.asdict(trial(count, seed=seed)), "torch": torch.__version__}


def measure_networks(path: Path, count: int, seed: int, jobs: int) -> None:
    rows = earlier_rows(path, "permutation networks")
    done = {row["seed"] for row in rows}
    sizes = {seed + k: min(CHUNK, count - k * CHUNK) for k in range(-(-count // CHUNK))}
    left = {s: n for s, n in sizes.items() if s not in done}
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn()) as bar, ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        task = bar.add_task("random networks", total=count, completed=count - sum(left.values()))
        for future in as_completed([pool.submit(networks_of_seed, s, n) for s, n in left.items()]):
            rows.append(future.result())
            bar.advance(task, rows[-1]["networks"])
            total = {
                "networks": sum(r["networks"] for r in rows),
                "permuted": sum(r["permuted"] for r in rows),
                "worst": max(r["worst"] for r in rows),
                "failures": [failure for r in rows for failure in r["failures"]],
            }
            write(path, heading("permutation networks") | {"total": total, "rows": sorted(rows, key=lambda r: r["seed"])})


def measure_architectures(path: Path, table: Path | None, names: list[str], jobs: int) -> None:
    known = [coverage.Row(**r) for r in earlier_rows(path, "permutation architectures")]
    names = names or coverage.architectures()
    place = {name: k for k, name in enumerate(coverage.architectures())}
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn()) as bar:
        task = bar.add_task("architectures", total=len(names), completed=len(known))

        def keep(rows: list[coverage.Row]) -> None:
            rows = sorted(rows, key=lambda r: place.get(r.name, len(place)))
            write(path, heading("permutation architectures") | {"rows": [dataclasses.asdict(r) for r in rows]})
            if table is not None:
                table.write_text("# What is permuted in each architecture\n\n" + coverage.table(rows))
            bar.update(task, completed=len(rows))

        keep(coverage.cover_all(names, known, jobs=jobs, progress=keep))


def gains_of(data: Path, depth: int, seed: int, seconds: float) -> list[dict[str, Any]]:
    """Return the rows of one network: in its own order for seed -1, else permuted; as trained, and with batch-norm re-estimated."""
    from accuracy_oneshot import CifarResNet, accuracy_percent, load, read

    torch.set_num_threads(1)
    test, train = read(data / "cifar10", "te"), read(data / "cifar10", "tr", 1)[0]
    calibration = list(train.split(CALIBRATION_ITEMS))
    model = CifarResNet(depth).eval()
    load(model, next((data / "resnet-cifar10").glob(f"resnet{depth}-*.th")))
    if seed >= 0:
        permute(model, (test[0][:2],), seed=seed, seconds=seconds)
    rows = []
    for again in (False, True):
        pruned = copy.deepcopy(model)
        record = twofour.prune(pruned, (test[0][:2],), calibration=calibration if again else None, permute=False)
        variant = "2:4 one-shot" + (", permuted" if seed >= 0 else "") + (", batch-norm re-estimated" if again else "")
        rows.append(
            {"net": f"ResNet-{depth}", "data": "CIFAR-10 test", "seed": max(seed, 0), "metric": "accuracy", "variant": variant}
            | {"value": accuracy_percent(pruned, *test), "kept_magnitude": record.kept_magnitude}
        )
    return rows


def measure_gains(path: Path, data: Path, depths: list[int], seeds: int, seconds: float, jobs: int) -> None:
    about = {"calibration": f"the first training images in batches of {CALIBRATION_ITEMS}", "search_seconds": seconds}
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        tasks = [pool.submit(gains_of, data, depth, seed, seconds) for depth in reversed(depths) for seed in range(-1, seeds)]
        for future in as_completed(tasks):
            rows += future.result()
            rows.sort(key=lambda r: (r["net"], r["variant"], r["seed"]))
            write(path, heading("accuracy") | about | {"rows": rows})


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["search", "networks", "architectures", "gains"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=20000, help="random networks")
    parser.add_argument("--seed", type=int, default=0, help="of the random networks")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at once, except of `search`")
    parser.add_argument("--seeds", type=int, default=10, help="search seeds")
    parser.add_argument("--seconds", type=float, default=20.0, help="search budget of `gains`, a network")
    parser.add_argument("--depths", type=int, nargs="*", default=[20, 32, 44, 56])
    parser.add_argument("--table", type=Path, help="Markdown file for `architectures`")
    parser.add_argument("--names", nargs="*", default=[], help="architectures, library:model; all by default")
    parser.add_argument("--data", type=Path, help="folder of `gains`")
    a = parser.parse_args()
    if a.part == "search":
        measure_search(a.out, a.seeds)
    elif a.part == "networks":
        measure_networks(a.out, a.count, a.seed, a.jobs)
    elif a.part == "architectures":
        measure_architectures(a.out, a.table, a.names, a.jobs)
    else:
        measure_gains(a.out, a.data, a.depths, a.seeds, a.seconds, a.jobs)


if __name__ == "__main__":
    main()
