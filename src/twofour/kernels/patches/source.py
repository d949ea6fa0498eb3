"""The text NVRTC gets for a Problem and Config: an include and one explicit instantiation."""

from pathlib import Path

from twofour.jit.source import Source
from twofour.kernels.patches.contract import THREADS, Config, Launch, Problem
from twofour.kernels.shared import flag, kernel_digest, kernel_text, type_name

FOLDER = Path(__file__).parent


def source(problem: Problem, config: Config, launch: Launch) -> Source:
    """Return the kernel text; equal for problems that differ only in the sizes and strides of images."""
    p = problem
    numbers = [config.vector, p.channels, *p.block, p.out_channels // config.vector]
    call = f"patches<{type_name(p.dtype)}, {type_name(p.out_dtype)}, {', '.join(map(str, numbers))}, {flag(launch.wide)}>"
    return kernel_text(FOLDER, f"twofour::{call}", THREADS)


def sources_digest() -> str:
    """Return the digest of the family's device sources, comments stripped."""
    return kernel_digest(FOLDER)
