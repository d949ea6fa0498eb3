"""Arms of an experiment on CIFAR-10: what is done to the dense network before and while it is trained on, seed by seed."""

import copy
import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from fleet import Images, Member, Program, Recipe, accuracy_percent, train_together
from ledger import Record, pattern_of
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import twofour
from twofour.pruning.methods import METHODS
from twofour.pruning.record import PRUNING_KEY
from twofour.training.masks import recorded_masks

log = logging.getLogger("arms")
HELD_OUT = 5000
CONTROL = "dense + same training"
CALIBRATION_BATCHES, CALIBRATION_ITEMS = 8, 250


def read_bytes(folder: Path, split: str, num_sheets: int | None = None) -> tuple[Tensor, Tensor]:
    """Return uint8 images `[n, 3, 32, 32]` and labels `[n]`, of the first sheets of 2,500 or of all."""
    sheets = [np.asarray(Image.open(path)) for path in sorted(folder.glob(f"{split}_*.webp"))[:num_sheets]]
    images = np.concatenate([s.reshape(50, 32, 50, 32, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, 32, 32) for s in sheets])
    return torch.from_numpy(images), torch.from_numpy(np.load(folder / f"labels_{split}.npy").astype(np.int64))[: len(images)]


@dataclass(frozen=True)
class Arm:
    """One way from the dense network.

    Attributes:
        variant: its name in the results.
        method: of pruning; "" leaves the network dense.
        reestimated: batch-norm statistics are re-estimated before training.
        recomputed: masks follow the dense weights (SR-STE), from the dense network on, instead of being held.
    """

    variant: str
    recipe: Recipe
    method: str = "magnitude"
    permuted: bool = False
    reestimated: bool = False
    recomputed: bool = False


@dataclass
class Data:
    """Images to train on and images to judge by."""

    train: Images
    judged: Images
    name: str

    @classmethod
    def of(cls, folder: Path, device: torch.device, *, held_out: bool, num_images: int | None) -> "Data":
        """Return all training images and the test images, or with `held_out` 45,000 training images and the other 5,000.

        `num_images` leaves the first so many to train on and twice as many to judge by at most; the name says so.
        """
        pixels, labels = read_bytes(folder / "cifar10", "tr")
        kept = len(labels) - HELD_OUT
        if held_out:
            name, other = "CIFAR-10 held-out training images", (pixels[kept:], labels[kept:])
            pixels, labels = pixels[:kept], labels[:kept]
        else:
            name, other = "CIFAR-10 test", read_bytes(folder / "cifar10", "te")
        stop = None if num_images is None else 2 * num_images
        train = Images(pixels[:num_images], labels[:num_images], device)
        name += "" if stop is None else f", first {stop}, of a trial"
        return cls(train, Images(other[0][:stop], other[1][:stop], device), name)


def pruned(dense: nn.Module, arm: Arm, train: Images) -> tuple[nn.Module, twofour.Pruning]:
    """Return the network pruned as the arm says, and the record; on the CPU, after methods that calculate much on the images' device."""
    calibrated = METHODS[arm.method].is_calibrated
    device = train.labels.device if calibrated else torch.device("cpu")
    model = copy.deepcopy(dense).to(device).eval()
    images = train.plain(CALIBRATION_BATCHES * CALIBRATION_ITEMS).to(device).contiguous()
    record = twofour.prune(
        model,
        (images[:2],),
        method=arm.method,
        permute=arm.permuted,
        calibration=list(images.split(CALIBRATION_ITEMS)) if calibrated or arm.reestimated else None,
        reestimate=arm.reestimated,
    )
    return model.cpu(), record


def weights_digest(model: nn.Module, told: str = "") -> str:
    """Return a digest of all weights and statistics, begun with a text."""
    digest = hashlib.sha256(told.encode())
    for value in model.state_dict().values():
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def pruned_once(dense: nn.Module, arm: Arm, train: Images, kept: Path) -> tuple[nn.Module, twofour.Pruning]:
    """Return what `pruned` does; written to `kept` by whichever process comes first, and read from there on any machine."""
    told = f"{twofour.__version__} {len(train)} {arm.method} {arm.permuted} {arm.reestimated}"
    kept.mkdir(parents=True, exist_ok=True)
    path = kept / f"start-{arm.method}-{weights_digest(dense, told)}.safetensors"
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            model, record = pruned(dense, arm, train)
            state = {name: value.contiguous() for name, value in model.state_dict().items()}
            save_file(state, path.with_suffix(".tmp"), {PRUNING_KEY: record.to_json()})
            path.with_suffix(".tmp").replace(path)
    model = copy.deepcopy(dense).cpu()
    with safe_open(path, "pt") as file:
        model.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - the file is no mapping
        # The order was that of the network pruned; this one holds its weights under its own names, and carries no order.
        record = replace(twofour.Pruning.from_json(file.metadata()[PRUNING_KEY]), order="")
    return model, replace(record, masks=recorded_masks(model, record))


@dataclass
class Experiment:
    """One network's arms.

    Attributes:
        make_dense: gives the dense network and the seconds that its training took here and now; called if something is left to do.
        fleet: networks trained at once.
        until: `time.monotonic()` after which no epoch begins.
        kept: where unfinished trainings lie.
    """

    name: str
    net: str
    make_dense: Callable[[], tuple[nn.Module, float]]
    program: Program
    data: Data
    record: Record
    fleet: int
    until: float
    kept: Path
    dense: nn.Module = field(init=False)

    def run(self, arms: Sequence[Arm], seeds: Sequence[int]) -> None:
        """Train what is not in the record yet.

        Raises:
            OutOfTimeError: time is up; the unfinished fleet was saved.
        """
        left = [(arm, seed) for seed in seeds for arm in arms if not self.record.has(self.row(arm.variant, seed, arm.recipe))]
        # What magnitude alone leaves stands beside every other start.
        usual = [Arm("", Recipe(), permuted=permuted) for permuted in dict.fromkeys(arm.permuted for arm in arms if arm.method)]
        alone = [arm for arm in usual if not self.record.has(self.oneshot_row(arm))]
        recorded = self.record.find(self.row("dense", None, None))
        if recorded and not left and not alone:
            log.info("%s: nothing is left to do", self.net)
            return
        self.dense, seconds = self.make_dense()
        plain, digest = self.data.judged.plain(), weights_digest(self.dense)
        if recorded is None:
            row = {**self.row("dense", None, None), "value": self.judge(self.dense, plain), "weights": digest}
            self.record.add({**row, "gpu_seconds": round(seconds, 2)} if seconds else row)
        elif recorded.get("weights", digest) != digest:
            raise SystemExit(
                f"{self.net}: the dense network is another than that of the rows in {self.record.out}, expected the same; "
                f"bring back its file to {self.kept}, or remove the network's rows"
            )
        starts: dict[tuple[Any, ...], tuple[nn.Module, twofour.Pruning | None]] = {}
        for arm in alone:
            self.start(arm, starts, plain)
        for (_, _), jobs in _grouped(left):
            for at in range(0, len(jobs), self.fleet):
                self.train(jobs[at : at + self.fleet], starts, plain)

    def train(self, jobs: Sequence[tuple[Arm, int]], starts: dict[tuple[Any, ...], Any], plain: Tensor) -> None:
        """Train one fleet and record it."""
        members, pruned_names = [], []
        for arm, seed in jobs:
            model, pruning = self.start(arm, starts, plain)
            pruned_names.append([] if pruning is None else [layer.name for layer in pruning.pruned])
            members.append(
                Member(
                    copy.deepcopy(model),
                    self.program,
                    self.data.train,
                    arm.recipe,
                    seed=seed,
                    pruning=pruning,
                    recomputed=arm.recomputed,
                    teacher=self.dense,
                    about={"net": self.net, "variant": arm.variant, "seed": seed},
                )
            )
        log.info(
            "%s: %d networks together, %d epochs of %d steps", self.net, len(jobs), jobs[0][0].recipe.epochs, members[0].steps_an_epoch
        )
        told = json.dumps([self.net, self.data.name, [(asdict(arm), seed) for arm, seed in jobs]])
        digest = hashlib.sha256(told.encode()).hexdigest()[:12]
        saved = self.kept / f"{digest}.pt"
        seconds, preparing = train_together(members, say=lambda line: log.info("%s %s", self.net, line), saved=saved, until=self.until)
        share = {"fleet": len(members), "gpu_seconds": round((seconds + preparing) / len(members), 2)}
        rows = []
        for (arm, seed), member, names in zip(jobs, members, pruned_names, strict=True):
            pattern = pattern_of(member.model, names) if names else {}
            rows.append({**self.row(arm.variant, seed, arm.recipe), "value": self.judge(member.model, plain), **pattern, **share})
            log.info("%s seed %d %s: %.2f", self.net, seed, arm.variant, rows[-1]["value"])
        # All at once, and the state only then removed: what is left of a fleet would be another fleet, and begin anew.
        self.record.add(*rows)
        saved.unlink(missing_ok=True)

    def start(self, arm: Arm, starts: dict[tuple[Any, ...], Any], plain: Tensor) -> tuple[nn.Module, twofour.Pruning | None]:
        """Return where an arm's training begins; its accuracy is recorded."""
        if not arm.method:
            return self.dense, None
        key = (arm.method, arm.permuted, arm.reestimated)
        if key not in starts:
            starts[key] = pruned_once(self.dense, arm, self.data.train, self.kept)
            row = self.oneshot_row(arm)
            if not self.record.has(row):
                model, pruning = starts[key]
                pattern = pattern_of(model, [layer.name for layer in pruning.pruned]) if pruning is not None else {}
                self.record.add({**row, "value": self.judge(model, plain), **pattern, "pruning": str(pruning)})
        model, pruning = starts[key]
        return self.dense if arm.recomputed else model, pruning

    def oneshot_row(self, arm: Arm) -> dict[str, Any]:
        """Return the row of where an arm's training begins, without its value."""
        notes = [arm.method, *["permuted"] * arm.permuted, *["batch-norm re-estimated"] * arm.reestimated]
        return self.row("2:4 one-shot, " + ", ".join(notes), None, None)

    def judge(self, model: nn.Module, plain: Tensor) -> float:
        """Return the accuracy in percent."""
        copied = copy.deepcopy(model).to(plain.device, memory_format=torch.channels_last)
        return round(accuracy_percent(copied, plain, self.data.judged.labels), 4)

    def row(self, variant: str, seed: int | None, recipe: Recipe | None) -> dict[str, Any]:
        """Return a row without its value."""
        head = {"experiment": self.name, "net": self.net, "data": self.data.name, "metric": "accuracy"}
        return {**head, "variant": variant, "seed": seed, "recipe": None if recipe is None else asdict(recipe)}


def _grouped(jobs: Sequence[tuple[Arm, int]]) -> list[tuple[tuple[int, int], list[tuple[Arm, int]]]]:
    """Return the jobs by length and batch: those of one fleet take the same steps."""
    groups: dict[tuple[int, int], list[tuple[Arm, int]]] = {}
    for arm, seed in jobs:
        groups.setdefault((arm.recipe.epochs, arm.recipe.batch), []).append((arm, seed))
    return list(groups.items())
