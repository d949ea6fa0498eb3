"""Training with masks held: recipes, the loop, checkpoints, and sparse training from scratch, in bites and of adapters."""

from twofour.training.checkpoint import Checkpoint, Epoch
from twofour.training.evaluate import calibration_batches, evaluate, evaluate_loss, predict
from twofour.training.gradual import Gradual, gradual
from twofour.training.hold import Hold, hold
from twofour.training.loop import Step, train
from twofour.training.lora import MaskedLora, add_lora, merge_adapters
from twofour.training.masks import derive_masks, recorded_masks
from twofour.training.order import permute_average, permute_state
from twofour.training.recipe import Recipe, load_recipe
from twofour.training.sr_ste import SrSte, sr_ste

__all__ = [
    "Checkpoint",
    "Epoch",
    "Gradual",
    "Hold",
    "MaskedLora",
    "Recipe",
    "SrSte",
    "Step",
    "add_lora",
    "calibration_batches",
    "derive_masks",
    "evaluate",
    "evaluate_loss",
    "gradual",
    "hold",
    "load_recipe",
    "merge_adapters",
    "permute_average",
    "permute_state",
    "predict",
    "recorded_masks",
    "sr_ste",
    "train",
]
