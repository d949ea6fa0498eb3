"""The text NVRTC gets for a Problem and Config: includes and one explicit instantiation. Shapes are launch arguments."""

from pathlib import Path

from twofour.jit.source import Source, digest, flatten
from twofour.kernels.gemm.contract import Config, Problem, loads_residual, staging_buffers, store_chunks

FOLDER = Path(__file__).parent
INCLUDE = FOLDER.parent / "include"

_ACTIVATION = {
    "none": "kNone",
    "relu": "kRelu",
    "relu6": "kRelu6",
    "gelu": "kGelu",
    "gelu_tanh": "kGeluTanh",
    "silu": "kSilu",
    "hardswish": "kHardswish",
}
_OUTPUT = {"bf16": "kBf16", "fp16": "kFp16", "fp32": "kFp32"}


def _flag(value: bool) -> str:
    return "true" if value else "false"


def source(problem: Problem, config: Config) -> Source:
    """Return the kernel text; equal for problems that differ only in shape."""
    e = problem.epilogue
    flags = ", ".join(_flag(f) for f in (e.scale, e.bias, e.residual, e.gated))
    epilogue = f"EpilogueChoice<Activation::{_ACTIVATION[e.activation]}, {flags}, Output::{_OUTPUT[problem.out_dtype]}>"
    sparse, bf16 = _flag(problem.sparse), _flag(problem.dtype == "bf16")
    params, arguments = "GemmParams", "params"
    if config.kernel == "tuned":
        numbers = (config.tile_rows, config.tile_tokens, config.stages, store_chunks(config), staging_buffers(problem, config))
        by_rows = ", true" if config.by_rows else ""
        tile = f"TileChoice<{', '.join(map(str, numbers))}, {sparse}, {bf16}{by_rows}>"
        header, threads, call = "gemm_tuned_16bit_sm90.cuh", 384, f"gemm_tuned<{tile}, {epilogue}>"
        if loads_residual(problem, config):
            params, arguments = "ResidualGemmParams", "params, &params.residual_map"
    elif config.kernel == "pipelined":
        header, threads, call = "gemm_pipelined_16bit_sm90.cuh", 128, f"gemm_pipelined<{sparse}, {bf16}, {epilogue}>"
    else:
        header, threads, call = "gemm_naive_16bit.cuh", 256, f"gemm_naive<{sparse}, {bf16}, {epilogue}>"
    stub = (
        f'#include "{header}"\n'
        f'extern "C" __global__ void __launch_bounds__({threads}, 1) gemm(const __grid_constant__ twofour::{params} params) {{\n'
        f"    using namespace twofour;\n    {call}({arguments});\n}}\n"
    )
    return Source("gemm", flatten(stub, [FOLDER, INCLUDE]))


def sources_digest() -> str:
    """Return the digest of the family's device sources, comments stripped."""
    return digest([*FOLDER.glob("*.cuh"), *INCLUDE.glob("*.cuh")])
