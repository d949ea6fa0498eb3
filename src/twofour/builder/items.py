"""Whether a network computes each item of a batch by itself, so that a batch may be filled up or run in parts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from twofour.builder.graph import Array
from twofour.errors import UnsupportedError
from twofour.plan import ValueSpec
from twofour.plan.record import one_line

ITEMS, KEPT = 3, 1  # the item that stays has others before and behind it


def why_whole(path: Path, inputs: Sequence[ValueSpec], outputs: Sequence[ValueSpec]) -> str:
    """Return why the ONNX file at `path` runs only in batches of the sizes it was built for; empty where its items run in any.

    ONNX Runtime computes a batch twice, with one item kept and the others exchanged: what the kept one gives must stay, to the bit.
    """
    if not any(spec.shape and spec.shape[0] is None for spec in inputs):
        return ""
    rng = np.random.default_rng(0)
    first = {spec.name: _random(spec, rng) for spec in inputs}
    second = {spec.name: _exchanged(first[spec.name], spec) for spec in inputs}
    names = [spec.name for spec in outputs if spec.shape and spec.shape[0] is None]
    if not names:
        return ""
    try:
        # Threads may part a sum one way or another; one thread does not.
        if any(_agree(path, names, first, second, threads) for threads in (0, 1)):
            return ""
    except UnsupportedError as error:
        return one_line(str(error))
    return "the network computes an item of a batch from the others too"


def _random(spec: ValueSpec, rng: np.random.Generator) -> Array:
    shape = tuple(ITEMS if size is None else size for size in spec.shape)
    if np.issubdtype(np.dtype(spec.dtype), np.floating):
        return rng.standard_normal(shape).astype(spec.dtype)
    return rng.integers(0, 2, shape).astype(spec.dtype)


def _exchanged(values: Array, spec: ValueSpec) -> Array:
    """The same with every item but the kept one replaced; an input that is not of items stays."""
    if not spec.shape or spec.shape[0] is not None:
        return values
    made = (1 - values.astype(np.float64)).astype(values.dtype)
    made[KEPT] = values[KEPT]
    return made


def _agree(path: Path, names: list[str], first: dict[str, Array], second: dict[str, Array], threads: int) -> bool:
    """Whether both batches give as many items as they have, and the same for the kept one.

    Raises:
        UnsupportedError: ONNX Runtime cannot run the model.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    try:
        session: Any = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        pairs = list(zip(session.run(names, first), session.run(names, second), strict=True))
    except Exception as error:
        # ONNX Runtime raises its own kinds; they share no public base.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        told = f"ONNX Runtime could not tell whether the network computes each item of a batch by itself ({reason})"
        raise UnsupportedError(told) from error
    return all(len(a) == ITEMS == len(b) and a[KEPT].tobytes() == b[KEPT].tobytes() for a, b in pairs)
