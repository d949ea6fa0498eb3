"""The ways to choose what is pruned: pure functions from matrix, statistics of its inputs and pattern to a mask, some to new values."""

from twofour.pruning.methods.alps import alps
from twofour.pruning.methods.method import Choice, Method
from twofour.pruning.methods.ria import ria_score
from twofour.pruning.methods.sparsegpt import sparsegpt, sparsegpt_mask
from twofour.pruning.methods.wanda import wanda_score

# Name -> method. Magnitude looks at the weight alone and needs no calibration.
METHODS: dict[str, Method] = {
    "magnitude": Method(),
    "wanda": Method(score=wanda_score),
    "ria": Method(score=ria_score),
    "sparsegpt-mask": Method(choose=sparsegpt_mask),
    "sparsegpt": Method(choose=sparsegpt),
    "alps": Method(choose=alps),
}

__all__ = ["METHODS", "Choice", "Method", "alps", "ria_score", "sparsegpt", "sparsegpt_mask", "wanda_score"]
