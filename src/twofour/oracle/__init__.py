"""Slow, obvious float64 NumPy versions of every operation the engine has."""

from twofour.oracle.gemm import gemm

__all__ = ["gemm"]
