"""CPU time of one eager call under inference_mode: Linear24 beside nn.Linear and PyTorch's own semi-structured weight.

Prints one line a way and size: median microseconds a call, spread (interquartile range over median) and n, the number of batches of
calls timed. A batch is `--calls` calls without waiting for the GPU, fewer than its launch queue holds, so the GPU's time does not count;
the queue is emptied between batches, and the ways take turns. `--json FILE` writes the rows too. Needs one Hopper GPU.

    python benchmarks/nn_call_time.py
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import nn

from twofour.nn import Linear24

SIZES = (
    (64, 1024, 1024),
    (512, 4096, 4096),
    (4096, 4096, 4096),
)  # tokens, in, out: the kernel's time differs 30-fold, the call's should not


def pruned(inputs: int, outputs: int) -> nn.Linear:
    """A bf16 layer of random weights pruned to the two largest of four."""
    linear = nn.Linear(inputs, outputs, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
    groups = linear.weight.view(-1, 4)
    keep = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, groups.abs().topk(2, dim=1).indices, True)
    groups.masked_fill_(~keep, 0)
    return linear


def ways(tokens: int, inputs: int, outputs: int) -> tuple[dict[str, Callable[[], object]], list[str]]:
    """The calls to time, and why a way is missing."""
    linear, missing = pruned(inputs, outputs), []
    layer = Linear24.from_linear(linear)
    x = torch.randn(tokens, inputs, device="cuda", dtype=torch.bfloat16)
    packed, bias = layer.packed, layer.bias
    op = torch.ops.twofour.linear24.default
    found: dict[str, Callable[[], object]] = {
        "twofour.nn.Linear24": lambda: layer(x),
        "twofour::linear24 through the dispatcher": lambda: op(x, packed, bias, outputs, inputs, torch.bfloat16),
        "nn.Linear": lambda: linear(x),
    }
    try:
        from torch.sparse import to_sparse_semi_structured

        theirs = nn.Linear(inputs, outputs, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
        theirs.weight = nn.Parameter(to_sparse_semi_structured(linear.weight), requires_grad=False)
        theirs(x)
        found["nn.Linear, torch.sparse.to_sparse_semi_structured"] = lambda: theirs(x)
    except (ImportError, RuntimeError, NotImplementedError, ValueError) as e:
        missing.append(f"torch.sparse.to_sparse_semi_structured cannot run here: {str(e).splitlines()[0]}")
    return found, missing


def measure(calls: dict[str, Callable[[], object]], number: int, batches: int) -> dict[str, list[float]]:
    """Microseconds a call of every batch, the ways taking turns; the first three rounds warm up."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(batches + 3):
        for name, call in calls.items():
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(number):
                call()
            us = (time.perf_counter() - begin) * 1e6 / number
            if turn >= 3:
                samples[name].append(us)
    return samples


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=100, help="calls of a batch; at most 500")
    parser.add_argument("--batches", type=int, default=100)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        parser.error("this measures a Hopper GPU (compute capability 9.0), none was found")
    if not 1 <= options.calls <= 500:
        parser.error(f"--calls {options.calls} would fill the launch queue, expected 1 to 500")
    machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "python": platform.python_version()}
    sys.stdout.write(", ".join(machine.values()) + f"; {options.calls} calls a batch\n")
    rows = []
    with torch.inference_mode():
        for tokens, inputs, outputs in SIZES:
            calls, missing = ways(tokens, inputs, outputs)
            for name, samples in measure(calls, options.calls, options.batches).items():
                samples.sort()
                n, median = len(samples), statistics.median(samples)
                spread = (samples[3 * n // 4] - samples[n // 4]) / median
                rows.append({"way": name, "tokens": tokens, "in": inputs, "out": outputs, "us": median, "spread": spread, "n": n})
                sys.stdout.write(f"{tokens:5} x {inputs} -> {outputs}  {name:52} {median:8.2f} us  spread {100 * spread:4.1f} %  n {n}\n")
            for line in missing:
                sys.stdout.write(f"{tokens:5} x {inputs} -> {outputs}  {line}\n")
    if options.json:
        command = f"python benchmarks/nn_call_time.py --json {options.json}"
        head = {
            "schema": 1,
            "kind": "call-time",
            "machine": machine,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": command,
        }
        options.json.write_text(json.dumps({**head, "calls_a_batch": options.calls, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
