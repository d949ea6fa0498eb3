"""The text NVRTC gets for a Problem and Config: an include and one explicit instantiation."""

from pathlib import Path

from twofour.jit.source import Source
from twofour.kernels.grouped.contract import Config, Launch, Problem, unit
from twofour.kernels.shared import flag, kernel_digest, kernel_text

FOLDER = Path(__file__).parent
POINTWISE = FOLDER.parent / "pointwise"  # whose activations are used
_ACTIVATION = {"none": "kCast", "relu": "kRelu", "relu6": "kClip", "sigmoid": "kSigmoid", "gelu": "kGelu", "gelu_tanh": "kGeluTanh"}
_ACTIVATION |= {"silu": "kSilu", "hardswish": "kHardswish"}


def source(problem: Problem, config: Config, launch: Launch) -> Source:
    """Return the kernel text; equal for problems that differ only in sizes."""
    p, e = problem, problem.epilogue
    numbers = [unit(p), config.warps, config.tiles, p.strides[0], launch.registers]
    flags = [launch.total == config.warps * config.tiles, p.dtype == "bf16", e.bias]
    choice = ", ".join([*map(str, numbers), *map(flag, flags), f"Op::{_ACTIVATION[e.activation]}"])
    bounds = f"{launch.threads}, {config.blocks}"
    return kernel_text(FOLDER, f"grouped<GroupedChoice<{choice}>>", bounds, (POINTWISE,))


def sources_digest() -> str:
    """Return the digest of the family's device sources, comments stripped."""
    return kernel_digest(FOLDER, (POINTWISE,))
