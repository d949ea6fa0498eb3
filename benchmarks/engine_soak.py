"""Runs an engine from several threads with changing batches for a long time; no result may differ, no memory may grow.

Each thread has a stream and calls the engine with batches in its own random order; each result is compared to the bit with the first one
of that batch, made alone. This process' device memory and host memory are taken every minute, after the first tenth of the time has
passed. Prints a line a minute and a verdict; exits with 1 where something differed or grew by more than `--slack` MiB. Needs a Hopper GPU.

    python benchmarks/engine_soak.py model.plan [--minutes 30] [--part 10 --json FILE] [--threads 8] [--batches 1,7,32,100] [--slack 64]

With `--json` the minutes may come in parts, also side by side, which must all find the same results; memory is judged within each
part. `--pause` lets a thread wait between calls, at random up to so many milliseconds, where other work shares the GPU.
"""

import argparse
import datetime
import hashlib
import json
import os
import random
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

import twofour
from twofour.files import write_text
from twofour.jit.driver import bus_id
from twofour.kernels.launchable import sources_digests
from twofour.plan import Plan
from twofour.runtime.memory import resident_bytes


def say(text: str) -> None:
    """Print a line at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


class Soak:
    """The engine, its inputs, the results they must give, and what was seen."""

    def __init__(self, engine: Any, batches: list[int], pause_s: float = 0.0) -> None:
        self.engine, self.pause_s = engine, pause_s
        self.inputs = {n: tuple(torch.from_numpy(a).cuda() for a in engine.random_inputs(n, seed=n)) for n in batches}
        self.wanted = {n: self.run(n) for n in batches}
        torch.cuda.synchronize()
        self.stop = threading.Event()
        self.wrong: list[str] = []
        self.calls = 0
        self._lock = threading.Lock()

    def run(self, batch: int) -> tuple[torch.Tensor, ...]:
        """The outputs of one batch."""
        found = self.engine(*self.inputs[batch])
        return found if isinstance(found, tuple) else (found,)

    def work(self, seed: int) -> None:
        """Call and compare until told to stop."""
        rng, stream, batches = random.Random(seed), torch.cuda.Stream(), list(self.inputs)
        while not self.stop.is_set():
            batch = rng.choice(batches)
            try:
                with torch.cuda.stream(stream):
                    found = self.run(batch)
                    same = all(torch.equal(a, b) for a, b in zip(found, self.wanted[batch], strict=True))
            except Exception as error:  # noqa: BLE001 - whatever a thread raises is the finding
                self.wrong.append(f"thread {seed}, batch {batch}: {type(error).__name__}: {error}")
                return
            if not same:
                self.wrong.append(f"thread {seed}, batch {batch}: another result")
            with self._lock:
                self.calls += 1
            if self.pause_s:
                time.sleep(rng.uniform(0.0, self.pause_s))


def gpu_bytes() -> int:
    """Return the device memory of this process, or of all processes where the driver does not tell them apart."""
    import pynvml

    pynvml.nvmlInit()
    listed = pynvml.nvmlDeviceGetComputeRunningProcesses(pynvml.nvmlDeviceGetHandleByPciBusId(bus_id(0)))
    if own := [process.usedGpuMemory for process in listed if process.pid == os.getpid() and process.usedGpuMemory]:
        return int(own[0])
    free, total = torch.cuda.mem_get_info()
    return total - free


def record_of(path: Path | None) -> dict[str, Any]:
    """Return what earlier parts left in the file."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path is not None and path.exists() else {"rows": []}
    return found


def joined(record: dict[str, Any], part: dict[str, Any], minutes: float) -> dict[str, Any]:
    """Return the record with a further part: passed once the minutes are full, every part passed and all found the same results."""
    parts = [*record["rows"], part]
    total = sum(one["minutes"] for one in parts)
    alike = all(one["results"] == parts[0]["results"] for one in parts)
    sums = {"minutes": round(total, 2), "calls": sum(one["calls"] for one in parts), "results_alike": alike}
    return {**record, **sums, "passed": all(one["passed"] for one in parts) and alike and total >= minutes, "rows": parts}


def digest_of(outputs: tuple[torch.Tensor, ...]) -> str:
    """Return a digest of some outputs' bits."""
    return hashlib.sha256(b"".join(y.cpu().numpy().tobytes() for y in outputs)).hexdigest()[:16]


def main() -> None:
    """Soak and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path)
    parser.add_argument("--minutes", type=float, default=30.0, help="of all parts together")
    parser.add_argument("--part", type=float, help="of this call; all that is missing by default")
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--batches", default="1,2,7,32,33")
    parser.add_argument("--slack", type=int, default=64, help="MiB that memory may differ")
    parser.add_argument("--pause", type=float, default=0.0, help="ms, at most, between the calls of a thread")
    parser.add_argument("--json", type=Path, help="where the parts are kept")
    options = parser.parse_args()
    record = record_of(options.json)
    missing = options.minutes - sum(part["minutes"] for part in record["rows"])
    seconds = 60 * max(0.0, missing if options.part is None else min(options.part, missing))
    plan = Plan.load(options.plan)
    soak = Soak(twofour.load(options.plan), [int(b) for b in options.batches.split(",")], options.pause / 1e3)
    threads = [threading.Thread(target=soak.work, args=(i,)) for i in range(options.threads)]
    for thread in threads:
        thread.start()
    begin, samples = time.perf_counter(), []
    step = min(60.0, seconds / 20)
    while time.perf_counter() - begin < seconds and not soak.wrong:
        time.sleep(step)
        samples.append({"s": time.perf_counter() - begin, "gpu_bytes": gpu_bytes(), "host_bytes": resident_bytes()[0], "calls": soak.calls})
        say(" ".join(f"{name} {value:,.0f}" for name, value in samples[-1].items()))
    soak.stop.set()
    for thread in threads:
        thread.join()
    settled = [s for s in samples if s["s"] > seconds / 10] or samples[-1:]
    growth = {name: settled[-1][name] - settled[0][name] for name in ("gpu_bytes", "host_bytes")} if settled else {}
    grown = [f"{name} grew by {value / 2**20:.0f} MiB" for name, value in growth.items() if value > options.slack << 20]
    for line in [*soak.wrong[:10], *grown]:
        say(line)
    ok = not soak.wrong and not grown
    elapsed = (time.perf_counter() - begin) / 60
    part = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "minutes": elapsed,
        "calls": soak.calls,
        "passed": ok,
        "wrong": soak.wrong,
        "growth": growth,
        "results": {str(batch): digest_of(outputs) for batch, outputs in soak.wanted.items()},
        "samples": samples,
    }
    head = {
        "schema": 1,
        "kind": "engine-soak",
        "machine": {**plan.about["machine"], "torch": torch.__version__},
        "date": part["date"],
        "command": f"python benchmarks/engine_soak.py {options.plan.name} --minutes {options.minutes:g}",
        "threads": options.threads,
        "batches": options.batches,
        "pause_ms": options.pause,
        "sources": sources_digests(),
    }
    say(f"{'passed' if ok else 'FAILED'}: {soak.calls:,} calls from {options.threads} threads in {elapsed:.1f} min")
    if options.json:
        with FileLock(options.json.with_name(f".{options.json.name}.lock")):
            found = {**joined(record_of(options.json), part, options.minutes), **head}
            write_text(options.json, json.dumps(found, indent=1) + "\n")
        verdict = "passed" if found["passed"] else "not passed yet"
        say(f"{found['minutes']:.1f} of {options.minutes:g} min in {len(found['rows'])} parts: {verdict}")
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
