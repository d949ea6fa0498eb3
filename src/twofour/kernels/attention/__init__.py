"""Scaled dot-product attention."""

from twofour.kernels.attention.contract import Problem

__all__ = ["Problem"]
