"""Dense network in; pruned, retrained, checked, exported, built, measured and reported out."""

from twofour.compress.pipeline import Compression, compress
from twofour.compress.settings import Settings

__all__ = ["Compression", "Settings", "compress"]
