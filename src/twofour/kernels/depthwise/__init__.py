"""Convolutions of each channel by itself; NHWC."""

from twofour.kernels.depthwise.contract import Config, Launch, Problem, candidates, default, derive, pack_weight, unpack_weight, why_not

__all__ = ["Config", "Launch", "Problem", "candidates", "default", "derive", "pack_weight", "unpack_weight", "why_not"]
