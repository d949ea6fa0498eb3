"""Folders of images and CIFAR-10's binary files → tasks."""

import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from twofour.errors import InputError
from twofour.sources.items import ArrayDataset
from twofour.sources.task import Task

log = logging.getLogger(__name__)
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff")
# Mean and standard deviation of ImageNet's channels, by which networks published for it are trained.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Side of the image that a network gets, in pixels; the share of the resized image's shorter side that it is.
IMAGE_PX, CENTRE = 224, 224 / 256
MOST_WORKERS = 16
CIFAR_RECORD_BYTES = 1 + 3 * 32 * 32
CIFAR_TRAIN = tuple(f"data_batch_{i}.bin" for i in range(1, 6))


def normalised(pixels: Tensor) -> Tensor:
    """Return uint8 images `[…, 3, h, w]` as float32: (x/255 − mean) / std, by channel."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (pixels.float() / 255 - mean) / std


def read_image(path: Path) -> Image.Image:
    """Return the picture in a file, decoded as RGB.

    Raises:
        InputError: the file is no image, or ends early.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"image {str(path)!r} cannot be read ({error}); mend or remove it, or give --skip-bad") from error


class ImageFolder(Dataset[tuple[Tensor, int]]):
    """Images in one folder a class; resized so that the shorter side fits, the centre cut out, normalised.

    `[3, size, size]` float32 each. An unreadable file raises InputError with its name when it is reached.
    """

    def __init__(self, folder: Path, classes: Sequence[str], size: int = IMAGE_PX) -> None:
        self.size, self.resize = size, round(size / CENTRE)
        self.items = [
            (path, label)
            for label, name in enumerate(classes)
            for path in sorted((folder / name).rglob("*"))
            if path.suffix.lower() in SUFFIXES
        ]
        if not self.items:
            raise InputError(f"image folder {str(folder)!r} holds no images, expected one folder a class with {', '.join(SUFFIXES)}")

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.items[index]
        picture = read_image(path)
        scale = self.resize / min(picture.size)
        width, height = (max(self.size, round(side * scale)) for side in picture.size)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        cut = picture.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + self.size, top + self.size))
        return normalised(torch.from_numpy(np.array(cut)).permute(2, 0, 1)), label

    def drop_bad(self) -> list[Path]:
        """Leave out the files that cannot be decoded, and return them; every file is decoded once, by as many threads as cores.

        Raises:
            InputError: no file is left.
        """

        def is_bad(path: Path) -> bool:
            try:
                read_image(path)
            except InputError as error:
                log.warning("skipped: %s", error.__cause__)
                return True
            return False

        with ThreadPoolExecutor(num_cores()) as pool:
            verdicts = list(pool.map(is_bad, [path for path, _ in self.items]))
        bad = [path for (path, _), wrong in zip(self.items, verdicts, strict=True) if wrong]
        self.items = [item for item, wrong in zip(self.items, verdicts, strict=True) if not wrong]
        if not self.items:
            raise InputError(f"image folder: none of {len(bad)} images can be read (first: {str(bad[0])!r}); mend them")
        return bad


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def image_folder(folder: str, size: int = IMAGE_PX, skip_bad: bool = False) -> Task:
    """Return the task of `folder/train/CLASS/*` and `folder/val/CLASS/*`, decoded to `size` × `size` pixels by worker processes.

    Raises:
        InputError: a folder is missing or empty, there is one class only, or the two splits' classes differ.
    """
    root = Path(folder)
    if not folder or not root.is_dir():
        state = "is a file" if root.exists() else "does not exist"
        raise InputError(f"image folder {folder!r} {state}; name a folder with train/CLASS/image.jpg and val/CLASS/image.jpg")
    splits = {}
    for split in ("train", "val"):
        if not (root / split).is_dir():
            raise InputError(f"image folder {str(root)!r} has no folder {split!r}, expected {split}/CLASS/image.jpg")
        splits[split] = sorted(p.name for p in (root / split).iterdir() if p.is_dir())
    classes = splits["train"]
    if len(classes) < 2:
        found = f"one class ({classes[0]!r})" if classes else "no classes"
        raise InputError(f"image folder {str(root / 'train')!r} has {found}, expected at least two folders, one a class")
    if unknown := sorted(set(splits["val"]) - set(classes)):
        raise InputError(f"image folder {str(root / 'val')!r} has classes that train has not: {unknown[:3]}; rename or remove them")
    train, validation = (ImageFolder(root / split, classes, size) for split in ("train", "val"))
    filled = {label for _, label in train.items}
    if empty := [name for label, name in enumerate(classes) if label not in filled]:
        raise InputError(f"image folder {str(root / 'train')!r}: class {empty[0]!r} holds no images; fill or remove its folder")
    notes: tuple[str, ...] = ()
    if skip_bad:
        total = len(train) + len(validation)
        if bad := [*train.drop_bad(), *validation.drop_bad()]:
            notes = (f"{len(bad)} of {total:,} images could not be read and were skipped (first: {bad[0]})",)
    workers = min(num_cores(), MOST_WORKERS)
    name = f"imagefolder:{folder}" if size == IMAGE_PX else f"imagefolder@{size}:{folder}"
    return Task(name, train, validation, num_classes=len(classes), workers=workers, notes=notes)


def read_cifar(paths: Sequence[Path]) -> ArrayDataset:
    """Return the images `[n, 3, 32, 32]` (normalised float32) and labels of CIFAR-10 binary files.

    Each record is one label byte and 3,072 pixel bytes, channel by channel. Source: the data set's page, "Binary version".

    Raises:
        InputError: a file is missing or no whole number of records, or a label is not 0…9.
    """
    images, labels = [], []
    for path in paths:
        if not path.is_file():
            raise InputError(f"CIFAR-10 file {str(path)!r} does not exist; expected the binary version (data_batch_1.bin … test_batch.bin)")
        data = np.fromfile(path, np.uint8)
        if not len(data) or len(data) % CIFAR_RECORD_BYTES:
            raise InputError(
                f"CIFAR-10 file {str(path)!r} has {len(data)} bytes, expected a multiple of {CIFAR_RECORD_BYTES}; fetch it again"
            )
        records = data.reshape(-1, CIFAR_RECORD_BYTES)
        if records[:, 0].max() > 9:
            raise InputError(f"CIFAR-10 file {str(path)!r} has a label above 9, expected 0 to 9; fetch it again")
        images.append(records[:, 1:].reshape(-1, 3, 32, 32))
        labels.append(records[:, 0].astype(np.int64))
    return ArrayDataset(normalised(torch.from_numpy(np.concatenate(images))), torch.from_numpy(np.concatenate(labels)))


def cifar10(folder: str) -> Task:
    """Return the task of CIFAR-10's binary version in `folder`: 50,000 images to train on, 10,000 to validate on.

    Raises:
        InputError: a file is missing or damaged.
    """
    root = Path(folder)
    train = read_cifar([root / name for name in CIFAR_TRAIN])
    return Task(f"cifar10:{folder}", train, read_cifar([root / "test_batch.bin"]), num_classes=10)


def task_of(result: Any, spec: str) -> Task:
    """Return what a user's function gave as a Task: a Task, or a pair (train, validation) of datasets of (input, class) items.

    Raises:
        InputError: it is neither, a dataset is empty, an item is no (input, class), or the training items do not show the classes.
    """
    if isinstance(result, Task):
        return result
    if not (isinstance(result, tuple) and len(result) == 2 and all(hasattr(d, "__getitem__") and hasattr(d, "__len__") for d in result)):
        kind = type(result).__name__
        raise InputError(f"function {spec!r} returned {kind}, expected a twofour.sources.Task or a pair (train, validation) of datasets")
    train, validation = result
    if not len(train) or not len(validation):
        raise InputError(f"function {spec!r} returned {len(train)} training and {len(validation)} validation items, expected at least one")
    try:
        classes = [int(dataset[i][1]) for dataset in (train, validation) for i in range(len(dataset))]
    except Exception as error:
        # The user's data sets may raise anything; that includes items that are no pairs.
        raise InputError(
            f"function {spec!r}: an item is no (input, class): {type(error).__name__}: {error}; return a Task for anything else"
        ) from error
    if min(classes) < 0:
        raise InputError(f"function {spec!r}: class {min(classes)} is negative, expected 0 and up")
    trained = set(classes[: len(train)])
    if len(trained) < 2:
        raise InputError(
            f"function {spec!r}: all {len(train)} training items are of class {classes[0]}, expected at least two classes; mend the "
            "labels, or return a Task with a loss of its own"
        )
    if unknown := sorted(set(classes) - trained):
        item = next(i for i, label in enumerate(classes[len(train) :]) if label not in trained)
        raise InputError(
            f"function {spec!r}: validation item {item} is of class {classes[len(train) + item]}, which no training item is of "
            f"(such classes: {unknown[:3]}); mend the labels, or return a Task with num_classes"
        )
    return Task(spec, train, validation, num_classes=max(classes) + 1)
