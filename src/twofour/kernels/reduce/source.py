"""The text NVRTC gets for a Problem and Config: an include and one explicit instantiation."""

from pathlib import Path

from twofour.jit.source import Source
from twofour.kernels.reduce.contract import Config, Launch, Problem
from twofour.kernels.shared import flag, kernel_digest, kernel_text, type_name

FOLDER = Path(__file__).parent
_KIND = {
    "mean": "kMean",
    "sum": "kSum",
    "max": "kMax",
    "l2": "kL2",
    "softmax": "kSoftmax",
    "layernorm": "kLayernorm",
    "rmsnorm": "kRmsnorm",
}


def source(problem: Problem, config: Config, launch: Launch) -> Source:
    """Return the kernel text; equal for problems that differ only in sizes."""
    kind, types = f"Kind::{_KIND[problem.kind]}", f"{type_name(problem.dtype)}, {type_name(problem.out_dtype)}"
    if config.kernel == "rows":
        choice = f"RowChoice<{types}, {config.vector}, {config.threads}, {launch.kept}, {flag(problem.scale)}, {flag(problem.bias)}>"
        call = f"reduce_rows<{kind}, {choice}>"
    else:
        call = f"reduce_columns<{kind}, {types}, {config.vector}, {config.threads}>"
    return kernel_text(FOLDER, call, launch.threads)


def sources_digest() -> str:
    """Return the digest of the family's device sources, comments stripped."""
    return kernel_digest(FOLDER)
