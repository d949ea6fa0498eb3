"""What a run's engines are built for, and the plans of both networks: the GPU's where it can run them, else the CPU's and why."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from twofour.builder import build
from twofour.errors import MissingExtraError, UnsupportedError
from twofour.jit.driver import capability
from twofour.plan import Plan

HOPPER = (9, 0)
CPU_BATCHES, GPU_BATCHES = (1, 32), (1, 32, 256)
log = logging.getLogger("twofour.compress")
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Target:
    """What the engines of a run are built for.

    Attributes:
        device: `cpu`, or `cuda:N` for GPU N. precision: of the engines. batches: that are measured.
        why_cpu: the sentence that says why the CPU's engines stand in for the GPU's; empty where they do not.
    """

    device: str = "cpu"
    precision: str = "fp32"
    batches: tuple[int, ...] = CPU_BATCHES
    why_cpu: str = ""

    @property
    def number(self) -> int:
        """Number of the GPU; 0 on the CPU."""
        return int(self.device.partition(":")[2] or 0)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Target":
        """Return the target in a run's record."""
        return cls(**{**value, "batches": tuple(value.get("batches", CPU_BATCHES))})

    def options(self, timing_cache: Path) -> dict[str, Any]:
        """Return what `build` is asked for: on the CPU its defaults, which take any batch."""
        if self.device == "cpu":
            return {}
        return {"device": self.device, "precision": self.precision, "batch": self.batches, "timing_cache": timing_cache}


@dataclass(frozen=True)
class Built:
    """The plans of a run by variant, and what they were built for."""

    plans: dict[str, Plan] = field(repr=False)
    target: Target


def target_of(device: str) -> Target:
    """Return what the engines of a run that trains on `device` are built for: fp16 on its GPU if that is a Hopper, else the CPU."""
    kind, _, index = device.partition(":")
    if kind != "cuda":
        return Target()
    number = int(index or 0)
    try:
        found = capability(number)
    except (UnsupportedError, MissingExtraError) as error:
        return on_cpu(str(error))
    if found != HOPPER:
        return on_cpu(f"GPU {number} has compute capability {found[0]}.{found[1]}, the GPU engine's kernels need 9.0 (Hopper)")
    return Target(f"cuda:{number}", "fp16", GPU_BATCHES)


def on_cpu(reason: str) -> Target:
    """Return the CPU as the target of a run that asked for a GPU."""
    return Target(why_cpu=f"The engines are the CPU's although the run was on a GPU: {reason}")


def build_engines(target: Target, files: Mapping[str, Path], timing_cache: Path, progress: Progress | None = None) -> Built:
    """Return the plan of each ONNX file for `target`; where the GPU cannot run one of the networks, those of the CPU for all of them.

    Raises:
        InputError, UnsupportedError: as `build` on the CPU.
    """
    try:
        options = target.options(timing_cache)
        return Built({variant: build(file, progress=progress, **options) for variant, file in files.items()}, target)
    except (UnsupportedError, MissingExtraError) as error:
        if target.device == "cpu":
            raise
        log.warning("no GPU engine: %s", error)
        return build_engines(on_cpu(str(error)), files, timing_cache)
