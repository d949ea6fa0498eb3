"""The one timing protocol: warmed up, interleaved, median and spread."""

from twofour.timing.cpu import time_interleaved
from twofour.timing.record import Timing

__all__ = ["Timing", "time_interleaved"]
