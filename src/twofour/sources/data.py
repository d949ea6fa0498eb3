"""Names of data sets on the command line → Task."""

import numpy as np
import torch

from twofour.errors import InputError, nearest
from twofour.sources.files import call_function, is_function_spec
from twofour.sources.images import cifar10, image_folder, task_of
from twofour.sources.task import ArrayDataset, Task

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
# Prefix -> (what makes the task of the rest, how to write it).
FOLDERS = {"imagefolder": (image_folder, "imagefolder:DIR"), "cifar10": (cifar10, "cifar10:DIR")}


def known_data() -> list[str]:
    """Return every way to name data, for messages and help."""
    return [*sorted(DATA), *(usage for _, usage in FOLDERS.values()), "FILE.py:FUNCTION"]


def resolve_task(spec: str) -> Task:
    """Return the task that `spec` names: `digits`, `imagefolder:DIR`, `cifar10:DIR`, or `FILE.py:FUNCTION`.

    Raises:
        InputError: the name is unknown, or what it names cannot be used.
    """
    if spec in DATA:
        return DATA[spec]()
    if is_function_spec(spec):
        return task_of(call_function(spec), spec)
    prefix, colon, rest = spec.partition(":")
    if colon and prefix in FOLDERS:
        return FOLDERS[prefix][0](rest)
    raise InputError(f"data {spec!r} is unknown, expected one of {known_data()}{nearest(spec, [*DATA, *FOLDERS])}")
