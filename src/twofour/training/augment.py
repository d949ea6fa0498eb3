"""Augmentations of whole batches, drawn from a given generator so that a run repeats bit for bit."""

import torch
from torch import Tensor

from twofour.training.recipe import AugmentationSection


def shifted(images: Tensor, pixels: int, generator: torch.Generator) -> Tensor:
    """Return `images` `[n, c, h, w]`, each moved by its own random −pixels … +pixels in both directions, zeros moved in."""
    n, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, (pixels,) * 4)
    down, right = (torch.randint(0, 2 * pixels + 1, (n, 1), generator=generator).to(images.device) for _ in range(2))
    rows = (down + torch.arange(height, device=images.device)).view(n, 1, height, 1)
    columns = (right + torch.arange(width, device=images.device)).view(n, 1, 1, width)
    items = torch.arange(n, device=images.device).view(n, 1, 1, 1)
    channels = torch.arange(images.shape[1], device=images.device).view(1, -1, 1, 1)
    return padded[items, channels, rows, columns]


def augmented(images: Tensor, settings: AugmentationSection, generator: torch.Generator) -> Tensor:
    """Return the batch with the recipe's augmentations applied."""
    if settings.shift:
        images = shifted(images, settings.shift, generator)
    if settings.flip:
        flip = (torch.rand(len(images), generator=generator) < 0.5).to(images.device)
        images = torch.where(flip.view(-1, 1, 1, 1), images.flip(-1), images)
    return images
