"""Accuracy after one retraining with the mask held, beside the dense network given the same training: ResNet-20 to 56 on CIFAR-10.

    python evidence/accuracy_cifar.py FOLDER results/GPU/accuracy-cifar.json --depths 20 32 44 56 --seeds 10
    python evidence/accuracy_cifar.py FOLDER results/GPU/accuracy-cifar-recipe.json --search --depths 20 --seeds 2

FOLDER as in `accuracy_oneshot.py`: the dense networks are others'. Both arms start from the same dense weights, and a seed gives both the
same order of images, crops and flips. `--search` trains on 45,000 images and judges recipes on the 5,000 left out; the test set takes no
part. A network that is in the file already is not trained again.
"""

import argparse
import copy
import datetime
import itertools
import json
import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accuracy_oneshot import CifarResNet, load, sources_digest
from fleet import Images, Member, Recipe, accuracy_percent, leave_default_stream, train_together
from PIL import Image
from torch import Tensor

import twofour
from twofour.files import write_text

log = logging.getLogger("accuracy_cifar")
HELD_OUT = 5000
RECIPE = Recipe()


def read_bytes(folder: Path, split: str, num_sheets: int | None = None) -> tuple[Tensor, Tensor]:
    """Return uint8 images `[n, 3, 32, 32]` and labels `[n]`, of the first sheets of 2,500 or of all."""
    sheets = [np.asarray(Image.open(path)) for path in sorted(folder.glob(f"{split}_*.webp"))[:num_sheets]]
    images = np.concatenate([s.reshape(50, 32, 50, 32, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, 32, 32) for s in sheets])
    return torch.from_numpy(images), torch.from_numpy(np.load(folder / f"labels_{split}.npy").astype(np.int64))[: len(images)]


def recipes(search: bool, base: Recipe) -> list[Recipe]:
    """Return the recipes to try."""
    if not search:
        return [base]
    return [replace(base, lr=lr, distill=distill) for lr, distill in itertools.product((0.02, 0.05, 0.1), (0.0, 0.5))]


def earlier(path: Path) -> list[dict[str, Any]]:
    """Return the rows of the file, if there is one."""
    return list(json.loads(path.read_text())["rows"]) if path.exists() else []


def write(path: Path, rows: list[dict[str, Any]], command: str) -> None:
    """Write the file aside and rename it."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    head = {
        "schema": 1,
        "kind": "accuracy",
        "machine": {"gpu": gpu, "torch": torch.__version__, "cuda": torch.version.cuda, "twofour": twofour.__version__},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        "sources_digest": sources_digest(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({**head, "rows": rows}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--depths", type=int, nargs="+", default=[20, 32, 44, 56])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--search", action="store_true", help="judge recipes on images held out of the training set")
    parser.add_argument("--epochs", type=int, default=RECIPE.epochs)
    parser.add_argument("--lr", type=float, default=RECIPE.lr)
    parser.add_argument("--distill", type=float, default=RECIPE.distill)
    parser.add_argument("--batch", type=int, default=RECIPE.batch)
    parser.add_argument("--images", type=int, help="only the first of the training set, for a trial of the script")
    a = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.backends.cudnn.benchmark = True
    leave_default_stream()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pixels, labels = (t[: a.images] for t in read_bytes(a.folder / "cifar10", "tr"))
    kept = len(labels) - HELD_OUT if a.search and a.images is None else len(labels)
    train = Images(pixels[:kept], labels[:kept], device)
    judged = Images(*((pixels[kept:], labels[kept:]) if kept < len(labels) else read_bytes(a.folder / "cifar10", "te")), device)
    data = "CIFAR-10 held-out training images" if a.search else "CIFAR-10 test"
    plain = judged.plain()
    base = replace(RECIPE, epochs=a.epochs, lr=a.lr, distill=a.distill, batch=a.batch)
    rows = earlier(a.out)
    command = f"python evidence/accuracy_cifar.py FOLDER {a.out} --depths {' '.join(map(str, a.depths))} --seeds {a.seeds}"
    command += (" --search" if a.search else "") + f" --epochs {a.epochs} --lr {a.lr:g} --distill {a.distill:g} --batch {a.batch}"
    for depth in a.depths:
        net = f"ResNet-{depth}"
        if any(row["net"] == net and row["variant"] != "dense" for row in rows):
            log.info("%s is in %s already", net, a.out)
            continue
        dense = CifarResNet(depth)
        load(dense, next((a.folder / "resnet-cifar10").glob(f"resnet{depth}-*.th")))
        sparse = copy.deepcopy(dense)
        pruning = twofour.prune(sparse, (torch.zeros(2, 3, 32, 32),), permute=False)
        teacher = copy.deepcopy(dense).requires_grad_(False)
        members = [
            Member(
                copy.deepcopy(sparse if variant == "2:4" else dense),
                train,
                recipe,
                seed=seed,
                pruning=pruning if variant == "2:4" else None,
                teacher=teacher,
                about={"seed": seed, "variant": variant},
            )
            for recipe in recipes(a.search, base)
            for seed in range(a.seeds)
            for variant in ("2:4", "dense + same training")
        ]
        log.info("%s: %d networks together, %d epochs of %d steps", net, len(members), a.epochs, members[0].steps_an_epoch)
        seconds = train_together(members, say=lambda line, net=net: log.info("%s %s", net, line))  # type: ignore[misc]
        common = {"net": net, "data": data, "metric": "accuracy"}
        reference = accuracy_percent(copy.deepcopy(dense).to(device, memory_format=torch.channels_last), plain, judged.labels)
        rows.append({**common, "seed": None, "variant": "dense", "value": reference})
        for member in members:
            value = accuracy_percent(member.model, plain, judged.labels)
            recipe = asdict(member.recipe)
            rows.append(
                {**common, **member.about, "value": value, "recipe": recipe, "fleet": len(members), "fleet_seconds": round(seconds, 1)}
            )
        write(a.out, rows, command)
        for row in rows[-len(members) :]:
            log.info("%s seed %s %s: %.2f %s", net, row["seed"], row["variant"], row["value"], row["recipe"])


if __name__ == "__main__":
    main()
