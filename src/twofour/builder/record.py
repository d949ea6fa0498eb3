"""The build report as data: for every layer what was tried, what won, and how far that is from what the GPU could do."""

import json
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from twofour.builder.estimate import shape_text
from twofour.builder.gpus import Gpu
from twofour.builder.lower import LayerCall, Lowered
from twofour.builder.memory import MemoryPlan
from twofour.errors import InputError
from twofour.kernels.records import from_plain
from twofour.plan.program import FALLBACK

SCHEMA = 1
LARGEST = 2**63 - 1  # of what a record counts
NO_GRAPH = "An engine with such layers launches its steps one by one, without a CUDA graph."


@dataclass(frozen=True)
class Timed:
    """What timing found for one layer: microseconds a candidate, why others were left out, the winner and whether it uses the zeros.

    `copy_us`: of a layer that ONNX Runtime computes on the CPU, the copies to the host and back within its time.
    """

    winner: str
    times_us: Mapping[str, float]
    left_out: Mapping[str, str]
    sparse: bool = False
    copy_us: float | None = None


@dataclass(frozen=True)
class LayerRecord:
    """One layer of the build report.

    Attributes:
        eligible, why_not_24: whether a 2:4 kernel could compute it, and why it does not run sparse as it is.
        candidates: microseconds of every tactic that ran. left_out: why the others did not.
        us: the winner's time; None where nothing was timed. share: of all layers' time, in 0…1.
        roofline_us: the least time the GPU's peak rates allow. over_roofline: us / roofline_us;
            None also for what ONNX Runtime computes, whose arithmetic is not known.
        copy_us: of a layer that ONNX Runtime computes on the CPU, the copies to the host and back within `us`; None for others.
    """

    name: str
    kind: str
    family: str
    shape: str
    flops: int
    num_bytes: int
    eligible: bool
    is_24: bool
    why_not_24: str
    candidates: dict[str, float]
    left_out: dict[str, str]
    winner: str
    sparse: bool
    us: float | None
    share: float | None
    roofline_us: float
    over_roofline: float | None
    copy_us: float | None = None


@dataclass(frozen=True)
class BuildRecord:
    """The build report of one batch size: its layers in order, and the memory."""

    model: str
    gpu: str
    batch: int
    precision: str
    layers: tuple[LayerRecord, ...]
    peak_bytes: int
    bound_bytes: int

    @property
    def total_us(self) -> float:
        """Sum of the winners' times."""
        return sum(layer.us or 0.0 for layer in self.layers)

    def __str__(self) -> str:
        sparse = sum(layer.sparse for layer in self.layers)
        return (
            f"BuildRecord({self.model} on {self.gpu}, batch {self.batch}, {self.precision}: {len(self.layers)} layers, {sparse} of them "
            f"2:4, {self.total_us / 1e3:.3f} ms, {self.peak_bytes:,} bytes of activations)"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the record as plain JSON values."""
        return {"schema": SCHEMA, **asdict(self), "total_us": self.total_us}

    @classmethod
    def from_json(cls, text: str) -> "BuildRecord":
        """Return the record that `to_json` gave.

        Raises:
            InputError: the text is no such record.
        """
        try:
            data = _without_controls(json.loads(text))
            if data.pop("schema") != SCHEMA:
                raise InputError(f"build record has another schema, this version reads {SCHEMA}; build again")
            data.pop("total_us")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"build record is damaged ({error!r}); build again") from error
        try:
            record = from_plain(cls, data, "it")
        except InputError as error:
            raise InputError(f"build record is damaged ({error}); build again") from error
        if not all(number is None or 0 <= number <= LARGEST for number in record._numbers()):
            raise InputError(f"build record is damaged (it holds a number outside of 0 to {LARGEST}); build again")
        return record

    def _numbers(self) -> Iterator[float | None]:
        """Every number in the record."""
        yield from (self.batch, self.peak_bytes, self.bound_bytes)
        for layer in self.layers:
            yield from (layer.flops, layer.num_bytes, layer.us, layer.share, layer.roofline_us, layer.over_roofline, layer.copy_us)
            yield from layer.candidates.values()


def _without_controls(data: Any) -> Any:
    """JSON values whose strings have `?` for controls, halves and non-characters: a terminal would obey them, a page cannot hold them."""
    if isinstance(data, str):
        return "".join("?" if unicodedata.category(c) in ("Cc", "Cs", "Cn") and c != "\n" else c for c in data)
    if isinstance(data, list):
        return [_without_controls(item) for item in data]
    return {_without_controls(key): _without_controls(item) for key, item in data.items()} if isinstance(data, dict) else data


def records_of(about: Mapping[str, Any]) -> list[BuildRecord]:
    """Return the build reports that a plan's `about` holds, one a batch size; none where nothing was timed.

    Raises:
        InputError: what it holds are no build reports.
    """
    builds = about.get("builds", [])
    if not isinstance(builds, list):
        raise InputError("build record is damaged (the plan's builds are no list); build again")
    return [BuildRecord.from_json(json.dumps(data)) for data in builds]


def roofline_us(call: LayerCall, gpu: Gpu, *, sparse: bool) -> float:
    """Return the longer of the arithmetic at peak rate and the traffic at full bandwidth, in microseconds."""
    peak = gpu.sparse_tflops if sparse else gpu.dense_tflops
    return max(call.flops / (peak * 1e6), call.num_bytes / (gpu.bandwidth_gb_s * 1e3))


def build_record(model: str, lowered: Lowered, memory: MemoryPlan, timed: Sequence[Timed | None], gpu: Gpu) -> BuildRecord:
    """Return the record of a build: `timed` holds one entry a call, None where nothing was timed."""
    total = sum(t.times_us[t.winner] for t in timed if t is not None and t.winner in t.times_us)
    layers = []
    for call, found in zip(lowered.calls, timed, strict=True):
        us = None if found is None else found.times_us.get(found.winner)
        sparse = found is not None and found.sparse
        least = roofline_us(call, gpu, sparse=sparse)
        layers.append(
            LayerRecord(
                call.name,
                call.kind,
                call.family,
                _shapes_of(call, lowered) if call.family == FALLBACK else shape_text(call),
                call.flops,
                call.num_bytes,
                call.eligible,
                call.is_24,
                call.why_not_24,
                {} if found is None else dict(found.times_us),
                {} if found is None else dict(found.left_out),
                "" if found is None else found.winner,
                sparse,
                us,
                us / total if us is not None and total else None,
                least,
                us / least if us is not None and least and call.family != FALLBACK else None,
                None if found is None else found.copy_us,
            )
        )
    return BuildRecord(model, gpu.name, lowered.batch, lowered.precision, tuple(layers), memory.peak_bytes, memory.bound_bytes)


def _shapes_of(call: LayerCall, lowered: Lowered) -> str:
    """A fallback's inputs and outputs."""

    def text(start: str) -> str:
        shapes = [lowered.places[place].shape for name, place in call.operands.items() if name.startswith(start)]
        return ", ".join("×".join(map(str, shape)) or "1" for shape in shapes)

    return f"{text('in')} → {text('d')}"


@dataclass(frozen=True)
class FallbackCost:
    """What the layers that ONNX Runtime computes on the CPU cost: `us` in all, `copy_us` of it for copies, `share` of all layers' time.

    `untimed` of the `layers` could not be timed and are not in the sums.
    """

    layers: int
    untimed: int
    us: float
    copy_us: float
    share: float | None

    def __str__(self) -> str:
        untimed = f" ({self.untimed} not timed)" if self.untimed else ""
        share = "" if self.share is None else f", {100 * self.share:.1f} % of all layers' time"
        return (
            f"ONNX Runtime computes {self.layers} layers on the CPU{untimed}: {self.us:,.1f} µs{share}, {self.copy_us:,.1f} µs of it "
            f"copies to the host and back. {NO_GRAPH}"
        )


def fallback_cost(record: BuildRecord) -> FallbackCost | None:
    """Return what a build's fallbacks cost; None where it has none."""
    layers = [layer for layer in record.layers if layer.family == FALLBACK]
    if not layers:
        return None
    us, copy_us = (sum(getattr(layer, name) or 0.0 for layer in layers) for name in ("us", "copy_us"))
    untimed = sum(layer.us is None for layer in layers)
    return FallbackCost(len(layers), untimed, us, copy_us, us / record.total_us if record.total_us else None)


def is_sparse_way(name: str) -> bool:
    """Return whether a candidate, by its name, leaves zeros out."""
    return "2:4" in name or name.startswith("cusparselt")


def why_winner(layer: LayerRecord) -> str:
    """Return in one phrase why a layer runs as it does: its gain from 2:4, or why there is none; of a fallback, what computes it."""
    if layer.family == FALLBACK:
        copies = "" if layer.copy_us is None else f", {layer.copy_us:.1f} µs of it copies to the host and back"
        return f"the engine lacks it: ONNX Runtime on the CPU{copies}"
    if layer.sparse:
        dense = [us for name, us in layer.candidates.items() if not is_sparse_way(name)]
        return f"2:4, {min(dense) / layer.us:.2f}× the best dense" if dense and layer.us else "2:4"
    if layer.why_not_24:
        return layer.why_not_24
    sparse = [us for name, us in layer.candidates.items() if is_sparse_way(name)]
    if layer.is_24 and sparse and layer.us:
        return f"2:4 is slower here: {min(sparse):.1f} µs against {layer.us:.1f}"
    return ""
