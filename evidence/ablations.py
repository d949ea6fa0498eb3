"""What each choice of the recipe is worth: method, length, learning rate, distillation, permutation, batch-norm, fixed masks.

    python evidence/ablations.py FOLDER results/GPU/accuracy-ablations-resnet20.json --nets ResNet-20 --seeds 5
    python evidence/ablations.py FOLDER results/GPU/accuracy-ablations-mobilenetv2.json --nets MobileNetV2 --seeds 2 --weight-decay 5e-4

FOLDER as in `accuracy_oneshot.py`. Everything, the dense network included, is trained on 45,000 images and judged on the 5,000 left out,
so that a recipe may be chosen from it. Every arm differs from the first in one thing; arms of another recipe have a control of their own.
"""

import argparse
import logging
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from accuracy_cifar import best_of
from arms import CONTROL, Arm, Data, Experiment
from fleet import OutOfTimeError, Recipe, leave_default_stream
from ledger import Record, add_arguments, add_training_arguments, command_of, deadline, shared_over_gpus
from networks import NETWORKS, dense_network, program_of

log = logging.getLogger("ablations")
SHOWN = ("nets", "seeds", "method", "epochs", "lr", "distill", "batch", "weight_decay", "only", "images")
METHODS = ("magnitude", "wanda", "ria", "sparsegpt", "alps")
SHORTER = (0.1, 0.3)
LOW = 0.05


def arms(base: Recipe) -> dict[str, list[Arm]]:
    """Return the arms by what they are about; the first are those that others are compared with."""
    lengths = [replace(base, epochs=max(1, round(share * base.epochs))) for share in SHORTER]
    other = replace(base, distill=0.0 if base.distill else 0.5)
    changed = {"length": lengths, "learning rate": [replace(base, lr=LOW * base.lr)], "distillation": [other]}
    return {
        "default": [Arm(CONTROL, base, method=""), Arm("2:4", base, base.method)],
        "method": [Arm(f"2:4, {method}", base, method) for method in METHODS if method != base.method],
        "permutation": [Arm("2:4, permuted", base, base.method, permuted=True)],
        "batch-norm": [Arm("2:4, batch-norm re-estimated", base, base.method, reestimated=True)],
        "masks": [Arm("2:4, masks recomputed", base, recomputed=True)],
        **{
            name: [arm for r in recipes for arm in (Arm(CONTROL, r, method=""), Arm("2:4", r, r.method))]
            for name, recipes in changed.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, seeds=5)
    parser.add_argument("--nets", nargs="+", choices=list(NETWORKS), default=["ResNet-20"])
    parser.add_argument("--searched", type=Path, help="as in accuracy_cifar.py")
    parser.add_argument("--only", nargs="+", choices=list(arms(Recipe())), help="these choices and the default")
    parser.add_argument("--method", choices=METHODS, default="magnitude", help="of pruning, where nothing else is said")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--distill", type=float, default=0.0)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--weight-decay", type=float, default=1e-4)
    add_training_arguments(parser)
    a = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if shared_over_gpus(a):
        return
    torch.backends.cudnn.benchmark = True
    leave_default_stream()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = Data.of(a.folder, device, held_out=True, num_images=a.images)
    record = Record(a.out, command_of("ablations.py", a, SHOWN), a.shard)
    base = Recipe(a.epochs, a.lr, a.weight_decay, a.batch, a.distill, a.method)
    if a.searched is not None:
        base = best_of(a.searched, base)
        a.lr, a.distill, a.method = base.lr, base.distill, base.method
        record.command = command_of("ablations.py", a, SHOWN)
    chosen = arms(base)
    wanted = [arm for name, group in chosen.items() if a.only is None or name in ("default", *a.only) for arm in group]
    for net in a.nets:
        network = NETWORKS[net]
        program = program_of(network, a.compile)
        usual = network.dense if a.dense_epochs is None else replace(network.dense, epochs=a.dense_epochs)
        until = deadline(a)
        make = partial(dense_network, net, data.train, a.folder, a.kept, program, published=False, recipe=usual, until=until)
        try:
            experiment = Experiment("ablations", net, make, program, data, record, a.fleet, until, a.kept)
            experiment.run(wanted, range(a.shard[0], a.seeds, a.shard[1]))
        except OutOfTimeError as error:
            raise SystemExit(f"{net}: {error}; run the same command again to go on") from error


if __name__ == "__main__":
    main()
