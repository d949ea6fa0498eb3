"""The record of one timed thing."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Timing:
    """Seconds of each call, in the order taken."""

    name: str
    seconds: tuple[float, ...]

    def percentile(self, q: float) -> float:
        """Return the `q`-th percentile in seconds, `q` in 0…100, interpolated linearly."""
        return float(np.percentile(self.seconds, q))

    @property
    def num_samples(self) -> int:
        """Number of timed calls."""
        return len(self.seconds)

    @property
    def median(self) -> float:
        """Median in seconds."""
        return self.percentile(50)

    @property
    def spread(self) -> float:
        """(p90 − p10) / median."""
        return (self.percentile(90) - self.percentile(10)) / self.median

    def __str__(self) -> str:
        return (
            f"Timing({self.name}: {1e3 * self.median:.3f} ms, p90 {1e3 * self.percentile(90):.3f}, p99 {1e3 * self.percentile(99):.3f}, "
            f"n {self.num_samples}, spread {100 * self.spread:.0f} %)"
        )
