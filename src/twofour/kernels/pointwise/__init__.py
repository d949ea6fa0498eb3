"""Chains of element-wise operations over broadcast operands, and strided copies."""

from twofour.kernels.pointwise.contract import Config, Launch, Operand, Problem, candidates, collapse, copy, default, derive, why_not

__all__ = ["Config", "Launch", "Operand", "Problem", "candidates", "collapse", "copy", "default", "derive", "why_not"]
