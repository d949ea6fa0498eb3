"""Accuracy after one retraining with the mask held, beside the dense network given the same training: six networks on CIFAR-10.

    python evidence/accuracy_cifar.py FOLDER results/GPU/accuracy-recipe.json --nets ResNet-20 --seeds 2 --search
    python evidence/accuracy_cifar.py FOLDER results/GPU/accuracy-cifar.json --searched results/GPU/accuracy-recipe.json
    python evidence/accuracy_cifar.py FOLDER results/GPU/accuracy-cifar-200.json --nets ResNet-20 --epochs 200
    python evidence/accuracy_cifar.py FOLDER results/GPU/accuracy-resnet18.json --nets ResNet-18 --seeds 5 --weight-decay 5e-4
    python evidence/accuracy_cifar.py FOLDER results/GPU/accuracy-mobilenetv2.json --nets MobileNetV2 --seeds 5 --permute off on

FOLDER as in `accuracy_oneshot.py`. ResNet-20 to 56 are others' networks; ResNet-18 and MobileNetV2 are trained here first. Both arms start
from the same dense weights, and a seed gives both the same order of images, crops and flips. `--search` trains the dense network and all
arms on 45,000 images and judges recipes on the 5,000 that neither has seen; the test set takes no part. `--searched` takes learning rate,
distillation and method from what a search found best. What is in the file already is not trained again; `--gpus 2` shares the seeds over
two GPUs.
"""

import argparse
import itertools
import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from arms import CONTROL, Arm, Data, Experiment
from fleet import OutOfTimeError, Recipe, leave_default_stream
from ledger import Record, add_arguments, add_training_arguments, best, command_of, deadline, rows_of, shared_over_gpus
from networks import NETWORKS, dense_network, program_of

from twofour.pruning.methods import METHODS

log = logging.getLogger("accuracy_cifar")
RECIPE = Recipe(epochs=15, lr=0.1, batch=512)
LRS, DISTILLS = (0.02, 0.06, 0.2), (0.0, 0.9)
SEARCHED = "alps"  # beside the recipe's own method
SHOWN = ("nets", "seeds", "search", "method", "epochs", "lr", "distill", "batch", "weight_decay", "permute", "images")


def recipes(search: bool, base: Recipe) -> list[Recipe]:
    """Return the recipes to try."""
    if not search:
        return [base]
    return [replace(base, lr=lr, distill=distill) for lr, distill in itertools.product(LRS, DISTILLS)]


def arms_of(recipe: Recipe, orders: Sequence[str], search: bool) -> list[Arm]:
    """Return a recipe's arms: the control, each channel order, and in a search another method's start."""
    found = [Arm(CONTROL, recipe, method="")]
    for order in orders:
        found.append(Arm("2:4, permuted" if order == "on" else "2:4", recipe, recipe.method, permuted=order == "on"))
    return [*found, Arm(f"2:4, {SEARCHED}", recipe, SEARCHED)] if search else found


def best_of(path: Path, base: Recipe) -> Recipe:
    """Return `base` with learning rate, distillation and method that a search found best on its held-out images (`ledger.best`)."""
    values: dict[tuple[float, float, str], list[float]] = {}
    controls: dict[tuple[float, float, str], list[float]] = {}
    for row in rows_of(path):
        recipe = row["recipe"]
        if not recipe or "test" in row["data"]:
            continue
        searched = row["variant"] == f"2:4, {SEARCHED}"
        for method in (recipe["method"], SEARCHED) if row["variant"] == CONTROL else (SEARCHED if searched else recipe["method"],):
            found = controls if row["variant"] == CONTROL else values
            found.setdefault((recipe["lr"], recipe["distill"], method), []).append(row["value"])
    if not values:
        raise SystemExit(f"{path} holds no 2:4 row judged on held-out images, expected those of --search; run it first")
    lr, distill, method = best(values, controls)
    log.info("best of %s: lr %g, distillation %g, %s", path, lr, distill, method)
    return replace(base, lr=lr, distill=distill, method=method)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, seeds=10)
    parser.add_argument("--nets", nargs="+", choices=list(NETWORKS), default=["ResNet-20", "ResNet-32", "ResNet-44", "ResNet-56"])
    parser.add_argument("--search", action="store_true", help="judge recipes on images held out of the training set")
    parser.add_argument("--searched", type=Path, help="results of --search whose best learning rate, distillation and method to take")
    parser.add_argument("--method", choices=list(METHODS), default=RECIPE.method, help="of pruning")
    parser.add_argument("--epochs", type=int, default=RECIPE.epochs)
    parser.add_argument("--lr", type=float, default=RECIPE.lr)
    parser.add_argument("--distill", type=float, default=RECIPE.distill)
    parser.add_argument("--batch", type=int, default=RECIPE.batch)
    parser.add_argument("--weight-decay", type=float, default=RECIPE.weight_decay)
    parser.add_argument("--permute", nargs="+", choices=["off", "on"], default=["off"], help="the channel orders to prune in")
    add_training_arguments(parser)
    a = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if shared_over_gpus(a):
        return
    torch.backends.cudnn.benchmark = True
    leave_default_stream()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = Data.of(a.folder, device, held_out=a.search, num_images=a.images)
    record = Record(a.out, command_of("accuracy_cifar.py", a, SHOWN), a.shard)
    base = Recipe(a.epochs, a.lr, a.weight_decay, a.batch, a.distill, a.method)
    if a.searched is not None:
        base = best_of(a.searched, base)
        a.lr, a.distill, a.method = base.lr, base.distill, base.method
        record.command = command_of("accuracy_cifar.py", a, SHOWN)
    arms = [arm for recipe in recipes(a.search, base) for arm in arms_of(recipe, a.permute, a.search)]
    for net in a.nets:
        network = NETWORKS[net]
        program = program_of(network, a.compile)
        usual = network.dense if a.dense_epochs is None else replace(network.dense, epochs=a.dense_epochs)
        until = deadline(a)
        make = partial(dense_network, net, data.train, a.folder, a.kept, program, published=not a.search, recipe=usual, until=until)
        try:
            experiment = Experiment("retraining", net, make, program, data, record, a.fleet, until, a.kept)
            experiment.run(arms, range(a.shard[0], a.seeds, a.shard[1]))
        except OutOfTimeError as error:
            raise SystemExit(f"{net}: {error}; run the same command again to go on") from error


if __name__ == "__main__":
    main()
