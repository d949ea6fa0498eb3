"""What pruning and holding cost on this machine: masks of a 4096×4096 weight, the step of ResNet-20 with and without `hold`, files.

    python evidence/pruning_cost.py results/cpu/pruning-cost.json [--files-gb 3]
    python evidence/pruning_cost.py results/GPU/pruning-cost.json --gpu

Processor time counts all threads and is what other work on the machine leaves alone; the load average says whether there was any. Masks:
15 calls each after a warm-up. Step: batch 128 of random 32×32 images, SGD with momentum; single steps with and without `hold` in turn, 7
of each, and the masking alone, which the difference of two steps cannot resolve. Files: a synthetic bf16 decoder of 4096 channels
in shards, written to and read from the temporary folder, so the page cache helps; peak memory is that above the interpreter's with torch.
With `--gpu` the masks alone, chosen on the GPU, each call timed by CUDA events.
"""

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accuracy_oneshot import CifarResNet
from safetensors.torch import save_file
from torch import nn

import twofour
from twofour.pattern import Pattern
from twofour.pruning.magnitude import pattern_mask

N, STEPS = 15, 7


def milliseconds(call: Callable[[], Any]) -> dict[str, float]:
    """Return the least and the median wall time of N calls, and the median processor time of all their threads."""
    call()
    wall, processor = [], []
    for _ in range(N):
        start, used = time.perf_counter(), time.process_time()
        call()
        wall.append(1e3 * (time.perf_counter() - start))
        processor.append(1e3 * (time.process_time() - used))
    return {"min_ms": min(wall), "median_ms": statistics.median(wall), "processor_median_ms": statistics.median(processor), "n": N}


def mask_rows() -> list[dict[str, Any]]:
    """Return one row a pattern and format."""
    rows = []
    for pattern in ("2:4", "4:8", "2:4 transposable"):
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn):
            weight = torch.randn(4096, 4096, generator=torch.Generator().manual_seed(0)).to(dtype)
            what = milliseconds(lambda weight=weight, pattern=pattern: pattern_mask(weight, Pattern.parse(pattern)))  # type: ignore[misc]
            rows.append({"what": "mask", "shape": [4096, 4096], "pattern": pattern, "dtype": str(dtype).removeprefix("torch.")} | what)
    return rows


def gpu_mask_rows() -> list[dict[str, Any]]:
    """Return one row a pattern and format, of GPU time."""
    rows = []
    for pattern in ("2:4", "4:8", "2:4 transposable"):
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn):
            weight = torch.randn(4096, 4096, device="cuda").to(dtype)
            took = []
            for _ in range(N + 3):
                start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                pattern_mask(weight, Pattern.parse(pattern))
                stop.record()
                stop.synchronize()
                took.append(start.elapsed_time(stop))
            took = took[3:]
            row = {"what": "mask", "shape": [4096, 4096], "pattern": pattern, "dtype": str(dtype).removeprefix("torch.")}
            rows.append(row | {"min_ms": min(took), "median_ms": statistics.median(took), "n": N})
    return rows


def hold_row() -> dict[str, Any]:
    """Return the processor time of a step of ResNet-20 with and without masks held."""
    torch.manual_seed(0)
    model = CifarResNet(20)
    images, labels = torch.randn(128, 3, 32, 32), torch.randint(0, 10, (128,))
    pruning = twofour.prune(model, (images[:2],), permute=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step() -> float:
        start = time.process_time()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        return 1e3 * (time.process_time() - start)

    step()
    plain, held = [], []
    for _ in range(STEPS):
        plain.append(step())
        with twofour.hold(model, optimizer, pruning):
            held.append(step())
    alone = milliseconds(twofour.hold(model, optimizer, pruning).apply)
    return {
        "what": "hold",
        "net": "ResNet-20",
        "batch": 128,
        "n": STEPS,
        "step_processor_ms": statistics.median(plain),
        "step_with_hold_processor_ms": statistics.median(held),
        "masking_min_ms": alone["min_ms"],
        "masking_processor_ms": alone["processor_median_ms"],
        "masking_share_percent": 100 * alone["processor_median_ms"] / statistics.median(plain),
    }


def write_checkpoint(folder: Path, gigabytes: float) -> int:
    """Write shards of decoder layers until `gigabytes` are reached; return the bytes."""
    shapes = {f"self_attn.{k}_proj": (4096, 4096) for k in "qkvo"} | {f"mlp.{k}_proj": (11008, 4096) for k in ("gate", "up")}
    shapes["mlp.down_proj"] = (4096, 11008)
    values = torch.randn(11008 * 4096, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    total = layer = 0
    while total < gigabytes * 1e9:
        tensors = {f"model.layers.{layer}.{k}.weight": values[: o * i].reshape(o, i).clone() for k, (o, i) in shapes.items()}
        path = folder / f"model-{layer:05d}.safetensors"
        save_file(tensors, path, {"format": "pt"})
        total += path.stat().st_size
        layer += 1
    return total


PRUNE = """
import json, re, sys, time
import numpy as np
from twofour.pattern import select
from twofour.pruning import prune_files
select(np.ones((1024, 1024), np.uint16))  # torch and the compiled loops are loaded
def memory(which):
    return 1024 * int(re.search(which + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
open("/proc/self/clear_refs", "w").write("5")  # the peak starts again from what is resident now
before = memory("VmRSS")
start, used = time.perf_counter(), time.process_time()
pruning = prune_files(sys.argv[1], sys.argv[2])
seconds, processor = time.perf_counter() - start, time.process_time() - used
added = memory("VmHWM") - before
largest = max(2 * layer.num_weights for layer in pruning.layers)
print(json.dumps({"seconds": seconds, "processor_seconds": processor, "peak_added_bytes": added, "largest_tensor_bytes": largest}))
"""


def files_row(gigabytes: float) -> dict[str, Any]:
    """Return the rate of `prune_files` and the memory it adds."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "dense"
        source.mkdir()
        total = write_checkpoint(source, gigabytes)
        # A fresh process prunes, so that what the writing above needed does not count.
        command = [sys.executable, "-c", PRUNE, str(source), str(Path(folder) / "sparse")]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    rate = total / found["seconds"]
    return {"what": "files", "bytes": total, "megabytes_a_second": rate / 1e6, "seconds_for_13_5_GB": 13.5e9 / rate} | found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--files-gb", type=float, default=3.0)
    parser.add_argument("--gpu", action="store_true", help="masks on the GPU only")
    arguments = parser.parse_args()
    rows = gpu_mask_rows() if arguments.gpu else [*mask_rows(), hold_row(), files_row(arguments.files_gb)]
    result = {
        "schema": 1,
        "kind": "pruning",
        "machine": {"cores": len(os.sched_getaffinity(0)), "load_average": os.getloadavg()[0], "torch": torch.__version__}
        | ({"gpu": torch.cuda.get_device_name()} if arguments.gpu else {}),
        "date": datetime.date.today().isoformat(),
        "command": f"python evidence/pruning_cost.py {arguments.out} "
        + ("--gpu" if arguments.gpu else f"--files-gb {arguments.files_gb:g}"),
        "rows": rows,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
