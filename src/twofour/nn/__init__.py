"""PyTorch modules with 2:4 weights on this package's kernels, for people who stay in PyTorch."""

from twofour.nn.convert import Conversion, LayerConversion, convert, restore
from twofour.nn.linear import Linear24, TrainableLinear24

__all__ = ["Conversion", "LayerConversion", "Linear24", "TrainableLinear24", "convert", "restore"]
