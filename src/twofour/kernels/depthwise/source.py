"""The text NVRTC gets for a Problem and Config: an include and one explicit instantiation."""

from pathlib import Path

from twofour.jit.source import Source
from twofour.kernels.depthwise.contract import ADDRESSES, REGISTERS, Config, Launch, Problem, values
from twofour.kernels.shared import flag, kernel_digest, kernel_text, type_name

FOLDER = Path(__file__).parent
MARGIN = 20  # registers by which a kernel may be larger than the contract believes
_OPERATION = {
    "none": "kCast",
    "relu": "kRelu",
    "relu6": "kClip",
    "sigmoid": "kSigmoid",
    "gelu": "kGelu",
    "gelu_tanh": "kGeluTanh",
    "silu": "kSilu",
    "hardswish": "kHardswish",
}


def source(problem: Problem, config: Config, launch: Launch) -> Source:
    """Return the kernel text; equal for problems that differ only in the sizes and pads of images."""
    p, e = problem, problem.epilogue
    window = f"Window<{p.kernel[0]}, {p.kernel[1]}, {p.strides[0]}, {p.strides[1]}>"
    behind = f"Behind<Op::{_OPERATION[e.activation]}, {flag(e.bias)}, {flag(e.residual)}>"
    bounds = str(launch.threads)
    if config.kernel == "walk":
        # NOTE: without the 4, ptxas 13.0 aims at more threads a multiprocessor and spills a few registers of small kernels for it.
        if 4 * launch.threads * (values(p, config) + ADDRESSES + MARGIN) <= REGISTERS:
            bounds += ", 4"
        numbers = f"{config.channels}, {config.columns}, {flag(launch.held)}, {launch.threads}, {flag(launch.wide)}"
    else:
        sizes = (config.channels, launch.images, launch.row_blocks, launch.block_rows, launch.tiles)
        numbers = f"Area<{window}, {', '.join(map(str, sizes))}>"
    return kernel_text(FOLDER, f"{config.kernel}<{type_name(p.dtype)}, {window}, {behind}, {numbers}>", bounds)


def sources_digest() -> str:
    """Return the digest of the family's device sources, comments stripped."""
    return kernel_digest(FOLDER)
