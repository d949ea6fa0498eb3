"""Grouped 3x3 convolutions of NHWC images."""

from twofour.kernels.grouped.contract import Config, Launch, Problem, as_grouped, candidates, default, derive, every, pack_weight, why_not

__all__ = ["Config", "Launch", "Problem", "as_grouped", "candidates", "default", "derive", "every", "pack_weight", "why_not"]
