"""A short retraining after one-shot pruning, with the mask held, for the tables of docs/methods.md; run by evidence/methods.py.

2,500 training images, soft labels of the dense network, so few steps that the method still shows. The dense network gets the same training,
and a seed gives every arm the same order of images, crops and flips. The recipe was chosen on training images that take no part in it.
"""

import copy
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accuracy_oneshot import CifarResNet, load
from arms import read_bytes
from fleet import MEAN, STD, Images, Member, Program, Recipe, accuracy_percent, leave_default_stream, train_together

import twofour

SEEDS = 3
SHEETS = 1
METHODS = ("dense", "magnitude", "sparsegpt")
NETWORKS = ("ResNet-20", "ResNet-56")
RECIPE = Recipe(epochs=10, lr=0.01, batch=128, distill=0.9)
VARIANT = {"dense": "dense + same training"}
log = logging.getLogger("methods_retrained")


def calibration_batches(images: torch.Tensor, count: int, items: int) -> list[torch.Tensor]:
    """Return `count` batches of `items` of the first uint8 images, normalised."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return list(((images[: count * items].float() / 255 - mean) / std).split(items))


def told(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as a row records it: without the method, which is the row's own."""
    return {name: value for name, value in asdict(recipe).items() if name != "method"}


def retrain(
    folder: Path, net: str, weights: str, method: str, seed: int, device: str, calibration: tuple[int, int], recipe: Recipe = RECIPE
) -> list[dict[str, Any]]:
    """Return one row: the accuracy after `recipe`, of the network pruned by `method` or of the dense one."""
    torch.set_num_threads(1)
    leave_default_stream()
    pixels, labels = read_bytes(folder / "cifar10", "tr", SHEETS)
    dense = CifarResNet(int(net.rpartition("-")[2]))
    load(dense, folder / "resnet-cifar10" / weights)
    model, pruning = copy.deepcopy(dense), None
    if method != "dense":
        batches = calibration_batches(pixels, *calibration)
        pruning = twofour.prune(model, (batches[0][:2],), method=method, permute=False, calibration=batches, reestimate=False)
    train = Images(pixels, labels, torch.device(device))
    program = Program(dense, compiled=False, bf16=True)
    member = Member(model, program, train, recipe, seed=seed, pruning=pruning, teacher=dense.requires_grad_(False))
    seconds = sum(train_together([member], say=log.info))
    test = Images(*read_bytes(folder / "cifar10", "te"), torch.device(device))
    row = {"net": net, "data": "CIFAR-10 test", "seed": seed, "metric": "accuracy", "variant": VARIANT.get(method, "2:4 retrained")}
    row |= {"method": "" if method == "dense" else method, "permuted": False, "recipe": told(recipe), "images": len(train)}
    row |= {"device": torch.cuda.get_device_name() if train.labels.is_cuda else "CPU", "seconds": round(seconds, 1)}
    return [row | {"steps": recipe.epochs * member.steps_an_epoch, "value": accuracy_percent(member.model, test.plain(), test.labels)}]
