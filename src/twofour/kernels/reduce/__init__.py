"""Sums over an axis and normalisations along the last one."""

from twofour.kernels.reduce.contract import Config, Launch, Problem, candidates, default, derive, why_not

__all__ = ["Config", "Launch", "Problem", "candidates", "default", "derive", "why_not"]
