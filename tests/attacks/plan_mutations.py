"""Damages GPU plans in a million ways and loads each: it loads, or it is refused in one sentence; nothing else may happen.

    python tests/attacks/plan_mutations.py [--count 1000000] [--seed 0] [--jobs 1] [--networks NAME…] [--record FILE]

Two kinds of damage take turns. Bytes of the file are changed, which is what a disk or a network does. Fields of the description are
replaced by values an attacker would choose, with lengths and digests made right again, so that the damage reaches the innermost checks.

A small plan is damaged, or the plans of the networks in `tests/graphs` in turn; `--jobs` processes share the count, each with a seed of its
own. `--record` adds a row a plan to a file of results.
"""

import argparse
import copy
import datetime
import json
import os
import platform
import random
import struct
import sys
import tempfile
import time
import tracemalloc
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "src"))

from plan_samples import plan

from twofour.errors import PlanFormatError
from twofour.files import write_text
from twofour.kernels.launchable import sources_digests
from twofour.plan import Plan
from twofour.plan.record import KEY

CHOSEN: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 16, 255, 2**31 - 1, 2**31, 2**32, 2**40, 2**63, -(2**63), 2**64, 10**40, 1e308, -0.5,
    float("nan"), float("inf"), "", "x", "fp16", "fp32", "bf16", "int64", "arena", "weights", "input", "output", "gemm", "conv", "matmul",
    "attention", "pointwise", "pool", "resize", "reduce", "fallback", "twofour", "cublaslt", "cudnn", "cusparselt", "onnxruntime", "bias",
    "nhwc", "\x00", "a" * 5000, [], [[]], [0], [1, 1, 1], [2**40] * 3, [[[[[[[[[[]]]]]]]]]], {}, {"a": 1}, ["add", ["in", 0], ["t", 9]],
]  # fmt: skip


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of every node of a JSON value."""
    found = [path] if path else []
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in items:
        found += places(child, (*path, key))
    return found


def damage(header: Any, found: list[tuple[Any, ...]], rng: random.Random) -> Any:
    """`header` with one to three nodes replaced, removed, doubled, or nudged; `found` are the places it had when it was whole."""
    for _ in range(rng.randint(1, 3)):
        *path, last = rng.choice(found)
        try:
            parent = header
            for key in path:
                parent = parent[key]
            action = rng.randrange(5)
            if action == 0:
                del parent[last]
            elif action == 1 and isinstance(parent[last], int) and not isinstance(parent[last], bool):
                parent[last] += rng.choice((-256, -16, -2, -1, 1, 2, 16, 256))
            elif action == 2 and isinstance(parent, dict):
                parent[rng.choice(("", "batch", "steps", "extra", "out_height"))] = copy.deepcopy(rng.choice(CHOSEN))
            elif action == 3 and isinstance(parent, list):
                parent.append(copy.deepcopy(parent[last]))
            else:
                parent[last] = copy.deepcopy(rng.choice(CHOSEN))
        except (KeyError, IndexError, TypeError):
            continue  # an earlier damage took this place away
    return header


def with_header(data: bytes, header: Any) -> bytes:
    """The file with another description, its length made right."""
    size = struct.unpack("<Q", data[:8])[0]
    outer = json.loads(data[8 : 8 + size])
    outer["__metadata__"][KEY] = json.dumps(header)
    text = json.dumps(outer).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


def load(path: Path) -> bool:
    """Whether a file loads; anything but a plan or a refusal in one sentence is raised."""
    try:
        Plan.load(path)
    except PlanFormatError as error:
        if "\n" in str(error) or len(str(error)) > 2000:
            raise AssertionError(f"a refusal of {len(str(error))} characters: {str(error)[:200]!r}") from error
        return False
    return True


def attack(count: int, seed: int, folder: Path, data: bytes | None = None) -> tuple[int, int]:
    """Return how many of `count` damaged plans loaded and were refused; `data`: a plan's file, by default a small one."""
    rng = random.Random(seed)
    path = folder / "damaged.plan"
    if data is None:
        plan((1, 4)).save(path)
        data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    text = json.loads(data[8 : 8 + size])["__metadata__"][KEY]
    found, loaded = places(json.loads(text)), 0
    for number in range(count):
        if number % 2:
            damaged = bytearray(data)
            for _ in range(rng.randint(1, 6)):
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
            if rng.random() < 0.1:
                del damaged[rng.randrange(len(damaged)) :]
            path.write_bytes(damaged)
        else:
            path.write_bytes(with_header(data, damage(json.loads(text), found, rng)))
        try:
            loaded += load(path)
        except KeyboardInterrupt:
            raise
        except BaseException:
            kept = Path(tempfile.gettempdir()) / f"crash-{seed}-{number}.plan"
            kept.write_bytes(path.read_bytes())
            print(f"damage {number} of seed {seed} did something else; kept as {kept}", file=sys.stderr)
            raise
    return loaded, count - loaded


def plan_of(name: str) -> bytes:
    """Return the plan file of a network in `tests/graphs`, each layer in the first way listed."""
    import onnx
    from graphs import network
    from test_engine_assemble import assembled

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(network(name), path)
        assembled(path, (1, 2), "fp16")[0].save(path.with_suffix(".plan"))
        return path.with_suffix(".plan").read_bytes()


def attack_apart(count: int, seed: int, data: bytes | None) -> tuple[int, int]:
    """Attack in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        return attack(count, seed, Path(folder), data)


def attack_with(pool: ProcessPoolExecutor, jobs: int, count: int, seed: int, data: bytes | None) -> tuple[int, int]:
    """Attack in several processes; the first `count % jobs` of them take one damage more."""
    asked = [pool.submit(attack_apart, count // jobs + (job < count % jobs), seed * jobs + job, data) for job in range(jobs)]
    found = [one.result() for one in asked]
    return sum(loaded for loaded, _ in found), sum(refused for _, refused in found)


def add_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write the rows into a file of results; earlier ones of the same sources and another plan or seed stay."""
    sources = sources_digests()
    kept = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    new = {(row["plan"], row["seed"]) for row in rows}
    value = {
        "schema": 1,
        "kind": "plan mutations",
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": f"python tests/attacks/plan_mutations.py {' '.join(sys.argv[1:])}",
        "sources_digests": sources,
        "rows": [row for row in kept if row["sources_digests"] == sources and (row["plan"], row["seed"]) not in new]
        + [row | {"sources_digests": sources} for row in rows],
    }
    write_text(path, json.dumps(value, indent=1) + "\n")


def peak_of_loading(path: Path) -> int:
    """Bytes Python allocates at most while a file is loaded or refused."""
    load(path)
    tracemalloc.start()
    load(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def main() -> None:
    """Attack and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--networks", nargs="*", default=[], help="attacked in turn, each its share of the count")
    parser.add_argument("--record", type=Path)
    options = parser.parse_args()
    bases = {name: plan_of(name) for name in options.networks} or {"sample": None}
    rows = []
    with ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool:
        for name, data in bases.items():
            count, begin = options.count // len(bases), time.perf_counter()
            loaded, refused = attack_with(pool, options.jobs, count, options.seed, data)
            seconds = round(time.perf_counter() - begin, 1)
            rows.append({"plan": name, "seed": options.seed, "count": count, "loaded": loaded, "refused": refused, "seconds": seconds})
            print(f"{name}: {count} damaged plans: {loaded} loaded, {refused} refused in one sentence, none did anything else")
            if options.record is not None:
                add_rows(options.record, rows)


if __name__ == "__main__":
    main()
