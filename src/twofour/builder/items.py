"""Whether a network computes each item of a batch by itself, so that a batch may be filled up or run in parts."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from twofour.builder.graph import Array
from twofour.errors import UnsupportedError
from twofour.ort import FATAL, session
from twofour.plan import ValueSpec
from twofour.plan.record import one_line

ITEMS, KEPT = 3, 1  # the item that stays has others before and behind it
# Of the largest value. Batches of two sizes are computed in two ways, whose roundings differ by far less, even in fp16; a network that
# counts its items or their places gives something else.
ALONE = 0.1


def why_whole(path: Path, inputs: Sequence[ValueSpec], outputs: Sequence[ValueSpec]) -> str:
    """Return why the ONNX file at `path` runs only in batches of the sizes it was built for; empty where its items run in any.

    ONNX Runtime computes a batch twice, with one item kept and the others exchanged: what the kept one gives must stay, to the bit. Alone,
    in a batch of one, it must give about the same.
    """
    if not any(_is_batched(spec) for spec in inputs):
        return ""
    rng = np.random.default_rng(0)
    first = {spec.name: _random(spec, rng) for spec in inputs}
    second = {spec.name: _exchanged(first[spec.name], spec) for spec in inputs}
    alone = {spec.name: first[spec.name][KEPT : KEPT + 1] if _is_batched(spec) else first[spec.name] for spec in inputs}
    names = [spec.name for spec in outputs if _is_batched(spec)]
    if not names:
        return ""
    try:
        # Threads may part a sum one way or another; one thread does not.
        if any(_agree(path, names, (first, second, alone), threads) for threads in (0, 1)):
            return ""
    except UnsupportedError as error:
        return one_line(str(error))
    return "the network computes an item of a batch from the others too, or from their number"


def _is_batched(spec: ValueSpec) -> bool:
    return bool(spec.shape) and spec.shape[0] is None


def _random(spec: ValueSpec, rng: np.random.Generator) -> Array:
    shape = tuple(ITEMS if size is None else size for size in spec.shape)
    if np.issubdtype(np.dtype(spec.dtype), np.floating):
        return rng.standard_normal(shape).astype(spec.dtype)
    return rng.integers(0, 2, shape).astype(spec.dtype)


def _exchanged(values: Array, spec: ValueSpec) -> Array:
    """The same with every item but the kept one replaced; an input that is not of items stays."""
    if not _is_batched(spec):
        return values
    made = (1 - values.astype(np.float64)).astype(values.dtype)
    made[KEPT] = values[KEPT]
    return made


def _agree(path: Path, names: list[str], batches: Sequence[dict[str, Array]], threads: int) -> bool:
    """Whether batches give as many items as they have, the first two the same for the kept one, the last about that for its only one.

    Raises:
        UnsupportedError: ONNX Runtime cannot run the model.
    """
    try:
        opened = session(path, severity=FATAL, threads=threads)
        found = list(zip(*(opened.run(names, batch) for batch in batches), strict=True))
    except Exception as error:
        # ONNX Runtime raises its own kinds, which share no public base; it may not be installed either.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        told = f"ONNX Runtime could not tell whether the network computes each item of a batch by itself ({reason})"
        raise UnsupportedError(told) from error
    return all(
        a.shape[:1] == b.shape[:1] == (ITEMS,)
        and c.shape[:1] == (1,)
        and a[KEPT].tobytes() == b[KEPT].tobytes()
        and _is_near(c[0], a[KEPT])
        for a, b, c in found
    )


def _is_near(found: Array, wanted: Array) -> bool:
    """Whether floating values are about the same; of others a rounding may have turned one."""
    if not np.issubdtype(wanted.dtype, np.floating):
        return found.shape == wanted.shape
    a, b = found.astype(np.float64), wanted.astype(np.float64)
    finite = np.isfinite(b)
    return a.shape == b.shape and bool(np.all(np.abs(a - b)[finite] <= ALONE * np.abs(b[finite]).max(initial=0.0)))
