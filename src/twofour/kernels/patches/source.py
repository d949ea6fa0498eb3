"""The text NVRTC gets for a Problem and Config: an include and one explicit instantiation."""

from pathlib import Path

from twofour.jit.source import Source, digest, flatten
from twofour.kernels.patches.contract import THREADS, Config, Launch, Problem
from twofour.kernels.shared import FOLDER as SHARED
from twofour.kernels.shared import flag, type_name

FOLDER = Path(__file__).parent
INCLUDE = FOLDER.parent / "include"


def source(problem: Problem, config: Config, launch: Launch) -> Source:
    """Return the kernel text; equal for problems that differ only in the sizes and strides of images."""
    p = problem
    numbers = [config.vector, p.channels, *p.block, p.out_channels // config.vector]
    call = f"patches<{type_name(p.dtype)}, {type_name(p.out_dtype)}, {', '.join(map(str, numbers))}, {flag(launch.wide)}>"
    stub = (
        f'#include "patches.cuh"\n'
        f'extern "C" __global__ void __launch_bounds__({THREADS}) patches(const __grid_constant__ twofour::PatchesParams params) {{\n'
        f"    using namespace twofour;\n    twofour::{call}(params);\n}}\n"
    )
    return Source("patches", flatten(stub, [FOLDER, SHARED, INCLUDE]))


def sources_digest() -> str:
    """Return the digest of the family's device sources, comments stripped."""
    return digest([*FOLDER.glob("*.cuh"), *SHARED.glob("*.cuh"), INCLUDE / "ptx_sm90.cuh"])
