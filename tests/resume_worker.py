"""A small `compress` in a process that can be killed; imported once by the fork server, so that a process costs no import."""

import contextlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import twofour.compress.pipeline
import twofour.report.measure
from twofour.compress import compress
from twofour.exchange import refuse_unexportable
from twofour.pruning import prune
from twofour.sources import ArrayDataset, Task
from twofour.sources.data import DATA
from twofour.sources.models import MODELS
from twofour.training import Recipe
from twofour.training.recipe import parse_recipe

RECIPE = parse_recipe(
    """
epochs = 6
batch = 16
label_smoothing = 0.1
channels_last = true
average = 0.9
[optimizer]
name = "sgd"
lr = 0.05
[schedule]
name = "onecycle"
warmup = 0.3
[augmentation]
shift = 1
flip = true
crop = 0.5
""",
    "small",
)


class SmallNet(nn.Module):
    """Everything a state has to carry: batch-norm statistics, dropout, weights laid out as NHWC."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 1), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.ReLU()
        )
        self.dropout = nn.Dropout(0.2)
        self.hidden = nn.Linear(8, 16)
        self.classifier = nn.Linear(16, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.dropout(torch.relu(self.hidden(self.features(x).mean((2, 3))))))  # type: ignore[no-any-return]


def small_task() -> Task:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(128, 1, 8, 8, generator=generator)
    labels = (images.mean((1, 2, 3)) > 0).long()
    return Task("small", ArrayDataset(images[:96], labels[:96]), ArrayDataset(images[96:], labels[96:]), num_classes=2)


def run(out: Path, recipe: Recipe = RECIPE, **options: Any) -> Any:
    """One small run, or the rest of it."""
    return compress("small", "small", out=out, recipe=recipe, measure_seconds=0.02, resume=True, **options)


def main(out: str) -> None:
    """The body of a process that may be killed at any moment."""
    # Otherwise a killed run would leave the processes that measure memory behind.
    twofour.report.measure.measure_peak_bytes = lambda plan_path, batch: 0
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stderr(nowhere):
        run(Path(out))


torch.set_num_threads(1)
MODELS["small"] = SmallNet
DATA["small"] = small_task


def warm() -> None:
    """Import and compile what the first run would, without starting a thread."""
    import matplotlib.figure
    import onnxruntime

    assert matplotlib.figure
    assert onnxruntime
    model, example = SmallNet(2).eval(), small_task().example_inputs()
    refuse_unexportable(model, example)
    prune(model, example)


if __name__ != "__main__" and os.environ.get("TWOFOUR_TEST_WARM"):
    warm()
