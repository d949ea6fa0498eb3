"""Matrix products with a 2:4 or dense weight on Hopper: 16-bit operands, fp32 accumulation, fused epilogue."""

from twofour.kernels.gemm.contract import Config, Epilogue, Launch, Problem, candidates, default, derive, why_not

__all__ = ["Config", "Epilogue", "Launch", "Problem", "candidates", "default", "derive", "why_not"]
