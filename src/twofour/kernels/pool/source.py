"""The text NVRTC gets for a Problem and Config: an include and one explicit instantiation."""

from pathlib import Path

from twofour.jit.source import Source
from twofour.kernels.pool.contract import MOST_UNROLLED, THREADS, AnyProblem, Config, Launch, Problem
from twofour.kernels.shared import flag, kernel_digest, kernel_text, type_name

FOLDER = Path(__file__).parent
_COORDINATE = {
    "half_pixel": "kHalfPixel",
    "pytorch_half_pixel": "kPytorchHalfPixel",
    "align_corners": "kAlignCorners",
    "asymmetric": "kAsymmetric",
}
_ROUNDING = {"round_prefer_floor": "kPreferFloor", "round_prefer_ceil": "kPreferCeil", "floor": "kFloor", "ceil": "kCeil"}


def source(problem: AnyProblem, config: Config, launch: Launch) -> Source:
    """Return the kernel text; equal for problems that differ only in sizes."""
    kind, wide = type_name(problem.dtype), flag(launch.wide)
    if isinstance(problem, Problem):
        small = problem.kernel[0] * problem.kernel[1] * config.columns <= MOST_UNROLLED
        window = problem.kernel if small else (0, 0)
        call = f"pool<{kind}, {config.vector}, {config.columns}, {window[0]}, {window[1]}, {flag(problem.kind == 'max')}, {wide}>"
    else:
        coordinate, rounding = _COORDINATE[problem.coordinate], _ROUNDING[problem.rounding]
        linear = flag(problem.kind == "linear")
        call = f"resize<{kind}, {config.vector}, {linear}, Coordinate::{coordinate}, Rounding::{rounding}, {wide}>"
    # NOTE: without the 4, ptxas 13.0 aims at more threads a multiprocessor and spills a few registers for it.
    return kernel_text(FOLDER, f"twofour::{call}", f"{THREADS}, 4")


def sources_digest() -> str:
    """Return the digest of the family's device sources, comments stripped."""
    return kernel_digest(FOLDER)
