"""Windows of an image reduced to one value, and images resized; NHWC."""

from twofour.kernels.pool.contract import Config, Launch, Problem, ResizeProblem, candidates, default, derive, why_not

__all__ = ["Config", "Launch", "Problem", "ResizeProblem", "candidates", "default", "derive", "why_not"]
