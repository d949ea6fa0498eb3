"""Convolutions of NHWC images with a fused epilogue."""

from twofour.kernels.conv.contract import Epilogue, Problem, as_gemm

__all__ = ["Epilogue", "Problem", "as_gemm"]
