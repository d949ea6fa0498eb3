"""Masks held by DDP and FSDP2 over NCCL, and what holding costs: ResNet-50 on random images, one process a GPU.

    torchrun --nproc-per-node 2 evidence/distributed_hold.py results/GPU/distributed-hold.json

Without torchrun one process trains plainly. Without a GPU the same runs over gloo on the CPU, which only shows that the script works
(`--batch 2 --pixels 64 --steps 1 --blocks 1`).

For each way of training: steps with and without `hold` interleaved in blocks, the median of each, and a count of elements that are not zero
although they were pruned, over all processes, after every step. Random weights and images: this shows correctness and cost, no accuracy.
"""

import argparse
import copy
import datetime
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import twofour
from twofour.training import Hold


class Bottleneck(nn.Module):
    """1×1, 3×3, 1×1 convolutions. Source: He et al. 2015, arXiv 1512.03385, figure 5."""

    def __init__(self, channels_in: int, width: int, stride: int) -> None:
        super().__init__()
        out = 4 * width
        self.body = nn.Sequential(
            *(nn.Conv2d(channels_in, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)),
            *(nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)),
            *(nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out)),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != out:
            self.shortcut = nn.Sequential(nn.Conv2d(channels_in, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def resnet50() -> nn.Sequential:
    """Return the network with fresh weights, seed 0."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    channels = 64
    for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(blocks):
            layers.append(Bottleneck(channels, width, stride if block == 0 else 1))
            channels = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> None:
    """One training step under bf16 autocast."""
    optimizer.zero_grad()
    with torch.autocast(images.device.type, torch.bfloat16):
        loss = nn.functional.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_a_step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, steps: int) -> float:
    """Return the mean wall time of a block of steps."""
    synchronize(images.device)
    start = time.perf_counter()
    for _ in range(steps):
        step(model, optimizer, images, labels)
    synchronize(images.device)
    return (time.perf_counter() - start) / steps


def not_zero(held: Hold, device: torch.device) -> int:
    """Return how many pruned elements are not zero, over all processes."""
    count = torch.tensor(sum(held.violations().values()), device=device)
    if dist.is_initialized():
        dist.all_reduce(count)
    return int(count)


def run(way: str, dense: nn.Module, pruning: twofour.Pruning, device: torch.device, settings: argparse.Namespace) -> dict[str, Any]:
    """Train by `way` and return the row."""
    # fully_shard takes contiguous parameters only.
    layout = torch.contiguous_format if way == "fsdp2" else torch.channels_last
    model: nn.Module = copy.deepcopy(dense).to(device, memory_format=layout)
    images = torch.randn(settings.batch, 3, settings.pixels, settings.pixels, device=device).to(memory_format=layout)
    labels = torch.randint(0, 1000, (settings.batch,), device=device)
    if way == "ddp":
        model = nn.parallel.DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
    elif way == "fsdp2":
        for layer in model.children():
            if isinstance(layer, Bottleneck):
                fully_shard(layer)
        fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    for _ in range(settings.steps):
        step(model, optimizer, images, labels)
    wrong = 0
    held = twofour.hold(model, optimizer, pruning)
    for _ in range(settings.steps):
        step(model, optimizer, images, labels)
        wrong += not_zero(held, device)
    held.remove()
    plain, with_hold = [], []
    for _ in range(settings.blocks):
        plain.append(seconds_a_step(model, optimizer, images, labels, settings.steps))
        held = twofour.hold(model, optimizer, pruning)
        with_hold.append(seconds_a_step(model, optimizer, images, labels, settings.steps))
        held.check()
        held.remove()
    without, with_ = statistics.median(plain), statistics.median(with_hold)
    return {
        "net": "ResNet-50",
        "way": way,
        "processes": dist.get_world_size() if dist.is_initialized() else 1,
        "batch_a_process": settings.batch,
        "n": settings.blocks,
        "step_ms": 1e3 * without,
        "step_with_hold_ms": 1e3 * with_,
        "cost_percent": 100 * (with_ / without - 1),
        "spread_ms": 1e3 * (max(plain) - min(plain)),
        "pruned_elements_not_zero": wrong,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    for name, default in (("batch", 128), ("pixels", 224), ("steps", 10), ("blocks", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    settings = parser.parse_args()
    rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", device_id=device if device.type == "cuda" else None)
    dense = resnet50()
    pruning = twofour.prune(dense, (torch.randn(1, 3, 64, 64),), permute=False)
    ways = ("ddp", "fsdp2") if dist.is_initialized() else ("one process",)
    rows = [run(way, dense, pruning, device, settings) for way in ways]
    if rank == 0:
        result = {
            "schema": 1,
            "kind": "training",
            "machine": {
                "gpu": torch.cuda.get_device_name() if device.type == "cuda" else None,
                "torch": torch.__version__,
                "cuda": torch.version.cuda,
                "twofour": twofour.__version__,
            },
            "date": datetime.date.today().isoformat(),
            "command": (f"torchrun --nproc-per-node {dist.get_world_size()}" if dist.is_initialized() else "python")
            + f" evidence/distributed_hold.py {settings.out}",
            "rows": rows,
        }
        settings.out.parent.mkdir(parents=True, exist_ok=True)
        settings.out.write_text(json.dumps(result, indent=1) + "\n")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
