"""Dense network in; pruned, retrained, checked, exported, built, measured and reported out."""

from twofour.compress.pipeline import Compression, Settings, compress

__all__ = ["Compression", "Settings", "compress"]
