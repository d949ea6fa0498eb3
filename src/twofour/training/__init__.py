"""Training with masks held: recipes, the loop, checkpoints."""

from twofour.training.checkpoint import Checkpoint, Epoch
from twofour.training.evaluate import evaluate, predict
from twofour.training.hold import Hold, hold
from twofour.training.loop import train
from twofour.training.masks import derive_masks
from twofour.training.recipe import Recipe, load_recipe

__all__ = ["Checkpoint", "Epoch", "Hold", "Recipe", "derive_masks", "evaluate", "hold", "load_recipe", "predict", "train"]
