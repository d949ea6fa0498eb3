"""Grouped 3x3 convolutions of NHWC images."""

from twofour.kernels.grouped.contract import Config, Launch, Problem, candidates, default, derive, every, of_conv, pack_weight, why_not

__all__ = ["Config", "Launch", "Problem", "candidates", "default", "derive", "every", "of_conv", "pack_weight", "why_not"]
