"""Augmentations of whole batches, drawn from a given generator so that a run repeats bit for bit."""

import torch
from torch import Tensor

from twofour.errors import InputError
from twofour.sources import Task
from twofour.training.recipe import AugmentationSection

# Width over height of a random crop, as in the recipes of ImageNet networks.
SLIMMEST, WIDEST = 3 / 4, 4 / 3


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


def cropped(images: Tensor, least: float, generator: torch.Generator) -> Tensor:
    """Return a random part of each image `[n, c, h, w]`, enlarged bilinearly to the whole.

    The part has `least` … 1 of the area, a width over height of 3/4 … 4/3 (log-uniform), and lies inside.

    Source: Szegedy et al. 2014, arXiv 1409.4842, section 6.
    """
    n = len(images)
    draw = torch.rand((n, 4), generator=generator)
    area = least + (1 - least) * draw[:, 0]
    ratio = torch.exp(torch.log(torch.tensor(SLIMMEST)) + draw[:, 1] * torch.log(torch.tensor(WIDEST / SLIMMEST)))
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = width, height
    theta[:, 0, 2], theta[:, 1, 2] = (2 * draw[:, 2] - 1) * (1 - width), (2 * draw[:, 3] - 1) * (1 - height)
    grid = torch.nn.functional.affine_grid(theta.to(images), list(images.shape), align_corners=False)
    return torch.nn.functional.grid_sample(images, grid, padding_mode="border", align_corners=False)


def refuse_unaugmentable(data: Task, settings: AugmentationSection) -> None:
    """Do nothing if the recipe's augmentations can be applied to the data.

    Raises:
        InputError: they are for images, and the data are none.
    """
    if not settings.is_on:
        return
    inputs = data.example_inputs(1)
    if inputs[0].ndim != 4 or not inputs[0].is_floating_point():
        raise InputError(
            f"the recipe's augmentation needs images [n, c, h, w], data {data.name!r} have {inputs[0].dtype}{list(inputs[0].shape)}; "
            "take the shipped recipe 'text', which has no [augmentation], or a file without it that starts from a copy of 'text'"
        )


def augmented(images: Tensor, settings: AugmentationSection, generator: torch.Generator) -> Tensor:
    """Return the batch with the recipe's augmentations applied: crop, shift, flip."""
    if settings.crop < 1:
        images = cropped(images, settings.crop, generator)
    if settings.shift:
        images = shifted(images, settings.shift, generator)
    if settings.flip:
        flip = (torch.rand(len(images), generator=generator) < 0.5).to(images.device)
        images = torch.where(flip.view(-1, 1, 1, 1), images.flip(-1), images)
    return images
