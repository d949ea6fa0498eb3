"""What GPUs with Sparse Tensor Cores can do at most, from their makers' data sheets; used where none is at hand to measure."""

from dataclasses import dataclass

from twofour.errors import InputError, nearest


@dataclass(frozen=True)
class Gpu:
    """A GPU's peak rates.

    Attributes:
        dense_tflops, sparse_tflops: fp16 and bf16 tensor cores with fp32 accumulation, dense and 2:4 (effective, zeros counted).
        bandwidth_gb_s: of its memory, 10^9 bytes a second. sms: multiprocessors. source: where the rates stand.
    """

    name: str
    dense_tflops: float
    sparse_tflops: float
    bandwidth_gb_s: float
    sms: int
    source: str


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100", 312.0, 624.0, 2039.0, 108, "NVIDIA A100 80 GB SXM data sheet, 2021"),
        Gpu("A30", 165.0, 330.0, 933.0, 56, "NVIDIA A30 data sheet, 2021"),
        Gpu("L4", 121.0, 242.0, 300.0, 58, "NVIDIA L4 data sheet, 2023 (242 TFLOPS with sparsity)"),
        Gpu("L40S", 362.05, 733.0, 864.0, 142, "NVIDIA L40S data sheet, 2023"),
        Gpu("RTX 4090", 165.2, 330.4, 1008.0, 128, "NVIDIA Ada GPU architecture white paper, appendix A (fp32 accumulation)"),
        Gpu("H100", 989.4, 1978.9, 3352.0, 132, "NVIDIA H100 architecture white paper, SXM5"),
        Gpu("H200", 989.4, 1978.9, 4800.0, 132, "NVIDIA H200 data sheet, SXM, 2024"),
        Gpu("B200", 2250.0, 4500.0, 7700.0, 148, "NVIDIA HGX B200 data sheet, one GPU of eight, 2024"),
    )
}


def gpu_named(name: str) -> Gpu:
    """Return the GPU of a name, whatever its case and spaces.

    Raises:
        InputError: the table has no such GPU.
    """
    wanted = name.lower().replace(" ", "").replace("nvidia", "").replace("geforce", "").replace("-", "")
    for gpu in GPUS.values():
        if gpu.name.lower().replace(" ", "") == wanted:
            return gpu
    raise InputError(f"GPU {name!r} is not in the table, expected one of {', '.join(GPUS)}{nearest(name, GPUS)}")
