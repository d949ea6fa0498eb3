"""Names of data sets on the command line → Task."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from twofour.errors import InputError, nearest
from twofour.sources.files import call_function, is_function_spec
from twofour.sources.images import IMAGE_PX, cifar10, image_folder, task_of
from twofour.sources.items import ArrayDataset
from twofour.sources.task import Task

NUM_DIGITS_VALIDATION = 360


def digits() -> Task:
    """Return scikit-learn's 1,797 handwritten digits (8×8 grey images): 1,437 to train on, 360 to validate on.

    The split is stratified and fixed, whatever the seed of a run.

    Source: Alpaydin and Kaynak 1998, UCI "Optical Recognition of Handwritten Digits".
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    images = torch.from_numpy((bunch.images / 16.0).astype(np.float32)[:, None])
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    train, validation = train_test_split(np.arange(len(labels)), test_size=NUM_DIGITS_VALIDATION, stratify=bunch.target, random_state=0)
    return Task("digits", ArrayDataset(images[train], labels[train]), ArrayDataset(images[validation], labels[validation]), num_classes=10)


DATA = {"digits": digits}
FOLDERS: dict[str, Callable[[str], Task]] = {"cifar10": cifar10}
IMAGES = "imagefolder"
USAGES = ("imagefolder:DIR", "imagefolder@SIZE:DIR", "cifar10:DIR", "FILE.py:FUNCTION")


def known_data() -> list[str]:
    """Return every way to name data, for messages and help."""
    return [*sorted(DATA), *USAGES]


def resolve_task(spec: str, *, workers: int | None = None, skip_bad: bool = False) -> Task:
    """Return the task that `spec` names: `digits`, `imagefolder:DIR`, `imagefolder@SIZE:DIR`, `cifar10:DIR`, or `FILE.py:FUNCTION`.

    Args:
        workers: processes that load items; None leaves it to the data.
        skip_bad: of image folders, leave out files that cannot be read; the task's notes say how many.

    Raises:
        InputError: the name is unknown, or what it names cannot be used.
    """
    if workers is not None and workers < 0:
        raise InputError(f"data: {workers} workers, expected 0 or more")
    task = _task_of(spec, skip_bad)
    return task if workers is None else replace(task, workers=workers)


def _task_of(spec: str, skip_bad: bool) -> Task:
    prefix, colon, rest = spec.partition(":")
    kind, at, size = prefix.partition("@")
    if colon and (kind == IMAGES or prefix in FOLDERS) and not rest.strip():
        raise InputError(f"data {spec!r} name no folder, expected {prefix}:DIR")
    if colon and kind == IMAGES and not is_function_spec(spec):
        if at and not (size.isdecimal() and int(size) > 0):
            raise InputError(f"data {spec!r}: size {size!r} is no positive number of pixels; write imagefolder@224:DIR")
        return image_folder(rest, int(size) if at else IMAGE_PX, skip_bad)
    if skip_bad:
        raise InputError(f"data {spec!r} is no folder of images, expected imagefolder:DIR for skip-bad; leave it out")
    if spec in DATA:
        return DATA[spec]()
    if is_function_spec(spec):
        return task_of(call_function(spec), spec)
    if colon and prefix in FOLDERS:
        return FOLDERS[prefix](rest)
    raise InputError(f"data {spec!r} is unknown, expected one of {known_data()}{nearest(spec, [*DATA, *FOLDERS, IMAGES])}")
