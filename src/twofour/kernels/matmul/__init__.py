"""Batched matrix products of two activations."""

from twofour.kernels.matmul.contract import Problem

__all__ = ["Problem"]
