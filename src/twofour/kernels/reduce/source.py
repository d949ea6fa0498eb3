"""The text NVRTC gets for a Problem and Config: an include and one explicit instantiation."""

from pathlib import Path

from twofour.jit.source import Source, digest, flatten
from twofour.kernels.reduce.contract import Config, Launch, Problem
from twofour.kernels.shared import FOLDER as SHARED
from twofour.kernels.shared import flag, type_name

FOLDER = Path(__file__).parent
INCLUDE = FOLDER.parent / "include"
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
    stub = (
        f'#include "reduce.cuh"\n'
        f'extern "C" __global__ void __launch_bounds__({launch.threads}) reduce(const __grid_constant__ twofour::ReduceParams params) {{\n'
        f"    using namespace twofour;\n    {call}(params);\n}}\n"
    )
    return Source("reduce", flatten(stub, [FOLDER, SHARED, INCLUDE]))


def sources_digest() -> str:
    """Return the digest of the family's device sources, comments stripped."""
    return digest([*FOLDER.glob("*.cuh"), *SHARED.glob("*.cuh"), INCLUDE / "ptx_sm90.cuh"])
