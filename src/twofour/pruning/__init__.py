"""Dense model → masked model: which weights are eligible and why not, which values are kept, and the record of it."""

from twofour.pruning.apply import eligible_names, prune
from twofour.pruning.batch_norm import reestimate_batchnorm
from twofour.pruning.blocks import prune_blocks
from twofour.pruning.files import prune_files
from twofour.pruning.permutation import Permutation, permute
from twofour.pruning.record import LayerRecord, Pruning
from twofour.pruning.sensitivity import Budgeted, Sensitivity, prune_within, sensitivity

__all__ = [
    "Budgeted",
    "LayerRecord",
    "Permutation",
    "Pruning",
    "Sensitivity",
    "eligible_names",
    "permute",
    "prune",
    "prune_blocks",
    "prune_files",
    "prune_within",
    "reestimate_batchnorm",
    "sensitivity",
]
