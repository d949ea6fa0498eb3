"""Blocks of an image's pixels gathered into channels: what the first layer of a network reads."""

from twofour.kernels.patches.contract import Config, Launch, Problem, candidates, default, derive, why_not

__all__ = ["Config", "Launch", "Problem", "candidates", "default", "derive", "why_not"]
