"""Times what ONNX Runtime computes on the CPU inside a GPU engine: the part on random inputs, and the copies there and back."""

from collections.abc import Callable

import numpy as np

from twofour.builder.graph import Array
from twofour.builder.lower import LayerCall, Lowered
from twofour.builder.record import Timed
from twofour.builder.storage import Place
from twofour.builder.tactics.bench import Bench
from twofour.builder.tactics.ways import in_dtype
from twofour.errors import UnsupportedError
from twofour.kernels.host_part import NUMPY, HostPart
from twofour.timing.cpu import time_interleaved

LIBRARY = "onnxruntime"
SECONDS, LEAST, MOST = 0.1, 5, 200  # of timing a part, and samples of it
Progress = Callable[[int, int, str], None]


def time_fallbacks(lowered: Lowered, bench: Bench, progress: Progress | None = None) -> list[Timed]:
    """Return the median times of every fallback of a network, in order; one that fails on random inputs says why it has none.

    An engine runs such a step by itself: the stream is waited for, the inputs are copied to the host one by one, ONNX Runtime computes
    with all cores, and the outputs are copied back. So its time is the sum of the part's and the copies', taken in turn.

    Raises:
        MissingExtraError: ONNX Runtime is not installed. UnsupportedError: it refuses a part, which no engine could run then.
    """
    calls = [call for call in lowered.calls if call.family == "fallback"]
    found = []
    for number, call in enumerate(calls):
        if progress is not None:
            progress(number, len(calls), call.name)
        found.append(_timed(call, lowered, bench))
    return found


def _timed(call: LayerCall, lowered: Lowered, bench: Bench) -> Timed:
    inputs = [(name, lowered.places[call.operands[f"in{i}"]]) for i, name in enumerate(call.problem.inputs)]
    outputs = [(name, lowered.places[call.operands[f"d{i}"]]) for i, name in enumerate(call.problem.outputs)]
    try:
        part = HostPart(call.name, lowered.model(call), *([(name, p.dtype) for name, p in places] for places in (inputs, outputs)))
    except UnsupportedError as error:
        raise UnsupportedError(f"build: {error}") from error
    rng = np.random.default_rng(0)
    arrays = [random_array(place, rng) for _, place in inputs]
    try:
        results = part.run(arrays)
    except UnsupportedError as error:
        return Timed(LIBRARY, {}, {LIBRARY: f"not timed: on random inputs {error}"})
    copy = bench.copies([array.nbytes for array in arrays], [result.nbytes for result in results])
    taken = time_interleaved({"part": lambda: part.run(arrays), "copies": copy}, seconds=SECONDS, min_samples=LEAST, max_samples=MOST)
    part_us, copy_us = (1e6 * taken[name].median for name in ("part", "copies"))
    return Timed(LIBRARY, {LIBRARY: part_us + copy_us}, {}, copy_us=copy_us)


def random_array(place: Place, rng: np.random.Generator) -> Array:
    """Return values of a place's shape as memory holds them: normal ones for floating types, 0 and 1 for others."""
    if place.dtype in ("fp16", "bf16", "fp32"):
        return in_dtype(rng.standard_normal(place.shape).astype(np.float32), place.dtype).reshape(place.shape)
    return rng.integers(0, 2, place.shape).astype(NUMPY[place.dtype])
