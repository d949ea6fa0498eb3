"""`estimate`: what 2:4 would buy a network on a GPU that is not here, predicted from data-sheet rates, layer by layer.

A prediction, never a measurement: each layer takes the longer of its arithmetic and its memory traffic, at the shares of the peak rates
that our kernels and the libraries reach on an H200, plus the time of a launch; a whole pass takes a little longer than its layers alone.
How far that is from measured times on the H200, of products and of whole networks, is part of every result.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from typing import Any

from twofour.builder.batches import BATCHES, batch_sizes
from twofour.builder.gpus import GPUS, Gpu, gpu_named
from twofour.builder.lower import Front, LayerCall
from twofour.errors import UnsupportedError
from twofour.kernels.conv import contract as conv

# Shares of the peak rates reached on large problems, and of the bandwidth on memory-bound ones; H200 at 700 W, results/nvidia-h200.
DENSE_SHARE = 0.69
SPARSE_SHARE = 0.51
BANDWIDTH_SHARE = 0.90
OTHER_SHARE = 0.16  # attention and batched products
DEPTHWISE_SHARE = 0.066  # of the dense peak: depthwise convolutions use no tensor cores
PASS_OVER_LAYERS = 1.12  # under sustained load the clock is lower than while layers are timed one by one, and kernels have gaps
LAUNCH_US = 3.0
TILE = 128
SPLIT_INPUTS = 384  # the fewest input channels that one of the parts of a tile cut along them has
SPARSE_WEIGHT_BYTES = 1.125  # a weight: half the values of two bytes, two bits of position for each of these
# Tensor cores multiply narrower convolutions of several positions as if they had this many channels: groups, and whole images.
LEAST_GROUP, LEAST_CHANNELS = 61, 32
NATIVE_GROUPS, BY_GROUP = (4, 8, 16, 32, 64), 3.5  # widths that cuDNN has kernels for; groups of others are computed one by one
OVERLAPPING = 1.6  # the arithmetic of a strided convolution whose patches overlap takes so much longer


@dataclass(frozen=True)
class Error:
    """How far predictions are from what was measured: median and 90th percentile of |predicted / measured - 1|, over n."""

    median: float
    p90: float
    n: int

    @classmethod
    def over(cls, errors: Sequence[float]) -> "Error":
        """Return the error of several predictions."""
        ordered = sorted(errors)
        n = len(ordered)
        return cls(round(ordered[n // 2], 4), round(ordered[ceil(0.9 * n) - 1], 4), n)

    def __str__(self) -> str:
        return f"{100 * self.median:.0f} % (median) and {100 * self.p90:.0f} % (90th percentile)"


# Against results/nvidia-h200/gemm.json; a test recomputes them.
H200_ERROR = {"dense": Error(0.032, 0.0797, 41), "2:4": Error(0.0568, 0.1813, 41)}
# Whole networks, against results/cpu/estimate-networks.json: a pass dense, a pass with 2:4, and the first over the second. The shares of
# what is no plain product were fitted to layers of these networks.
NETWORKS_ERROR = {"dense": Error(0.086, 0.1217, 11), "2:4": Error(0.0955, 0.1534, 11), "gain": Error(0.031, 0.0625, 11)}


@dataclass(frozen=True)
class LayerEstimate:
    """One layer's prediction in microseconds; `sparse_us` None where it cannot run sparse. `why_not`: that, or why 2:4 would not help."""

    name: str
    family: str
    shape: str
    flops: int
    dense_us: float
    sparse_us: float | None
    bound: str
    why_not: str

    @property
    def best_us(self) -> float:
        """The faster of the two: a layer that 2:4 does not help stays dense."""
        return self.dense_us if self.sparse_us is None else min(self.dense_us, self.sparse_us)


@dataclass(frozen=True)
class Estimate:
    """A network's prediction on one GPU for one batch size."""

    gpu: str
    batch: int
    precision: str
    layers: tuple[LayerEstimate, ...]

    @property
    def dense_us(self) -> float:
        """A pass with all layers dense."""
        return PASS_OVER_LAYERS * sum(layer.dense_us for layer in self.layers)

    @property
    def sparse_us(self) -> float:
        """A pass with each layer the faster way."""
        return PASS_OVER_LAYERS * sum(layer.best_us for layer in self.layers)

    def __str__(self) -> str:
        gain = self.dense_us / self.sparse_us
        return (
            f"prediction for {self.gpu}, batch {self.batch}, {self.precision}: dense {self.dense_us / 1e3:.3f} ms, "
            f"2:4 {self.sparse_us / 1e3:.3f} ms, {gain:.2f}× (not measured)"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the estimate as plain JSON values, labelled a prediction."""
        errors = {
            what: {kind: asdict(error) for kind, error in found.items()}
            for what, found in (("products", H200_ERROR), ("networks", NETWORKS_ERROR))
        }
        layers = [{**asdict(layer), "best_us": layer.best_us} for layer in self.layers]
        totals = {"dense_us": self.dense_us, "sparse_us": self.sparse_us}
        head = {"kind": "prediction", "gpu": self.gpu, "batch": self.batch, "precision": self.precision, "source": GPUS[self.gpu].source}
        return {**head, **totals, "error_on_h200": errors, "layers": layers}


def product_us(
    gpu: Gpu, tokens: int, outputs: int, inputs: int, *, sparse: bool, extra_bytes: int = 0, padded: float = 1.0
) -> tuple[float, str]:
    """Return the predicted microseconds of `[tokens, inputs] × [outputs, inputs]` in 16 bits, and what bounds it.

    Args:
        extra_bytes: traffic beside both operands and the result. padded: factor of arithmetic on channels that are not there.
    """
    flops = 2.0 * tokens * outputs * inputs * padded
    peak = (gpu.sparse_tflops * SPARSE_SHARE if sparse else gpu.dense_tflops * DENSE_SHARE) * 1e6  # a microsecond
    tiles = ceil(tokens / TILE) * ceil(outputs / TILE)
    busy = min(1.0, tiles * max(1, inputs // SPLIT_INPUTS) / gpu.sms)
    weight = outputs * inputs * (SPARSE_WEIGHT_BYTES if sparse else 2.0)
    traffic = 2.0 * tokens * (inputs + outputs) + weight + extra_bytes
    return _longer(gpu, flops / (peak * busy), traffic)


def _longer(gpu: Gpu, arithmetic_us: float, traffic: float) -> tuple[float, str]:
    memory_us = traffic / (gpu.bandwidth_gb_s * BANDWIDTH_SHARE * 1e3)
    if max(arithmetic_us, memory_us) < LAUNCH_US:
        bound = "launch"
    else:
        bound = "arithmetic" if arithmetic_us >= memory_us else "memory"
    return LAUNCH_US + max(arithmetic_us, memory_us), bound


def _conv_us(gpu: Gpu, p: conv.Problem, *, sparse: bool) -> tuple[float, str]:
    """Return the predicted time of a convolution as the matrix product it is; its image is read once, not once a kernel position."""
    channels, positions = p.inputs // p.groups, p.kernel[0] * p.kernel[1]
    inputs = channels * positions
    image = 2 * p.batch * p.height * p.width * p.inputs
    residual = 2 * p.pixels * p.outputs if p.epilogue.residual else 0
    if p.groups > 1 and channels < 4:
        # What a thread multiplies it has loaded before: the arithmetic adds to the time of the memory.
        moved_us, bound = _longer(gpu, 0.0, image + 2 * p.pixels * p.outputs + residual)
        return moved_us + p.flops / (gpu.dense_tflops * DEPTHWISE_SHARE * 1e6), bound
    padded = 1.0
    if p.groups > 1:
        padded = max(1.0, LEAST_GROUP / channels) if channels in NATIVE_GROUPS else BY_GROUP
    elif positions > 1:
        padded = max(1.0, TILE / p.outputs) * max(1.0, LEAST_CHANNELS / channels)
    if any(k > s > 1 for k, s in zip(p.kernel, p.strides, strict=True)) and p.groups == 1:
        padded *= OVERLAPPING
    extra = image - 2 * p.pixels * inputs + residual
    return product_us(gpu, p.pixels, p.outputs, inputs, sparse=sparse, extra_bytes=extra, padded=padded)


def _activation_us(gpu: Gpu, activation: str, elements: int) -> float:
    """Return what an activation of many instructions adds: it follows its product, reading and writing the output once more."""
    return 0.0 if activation in ("none", "relu", "relu6") else _longer(gpu, 0.0, 4.0 * elements)[0]


def shape_text(call: LayerCall) -> str:
    """Return a layer's sizes as people write them."""
    p = call.problem
    if call.family == "gemm":
        return f"{p.tokens}×{p.inputs} → {p.outputs}"
    if call.family == "conv":
        groups = f", {p.groups} groups" if p.groups > 1 else ""
        stride = f" /{p.strides[0]}" if p.strides != (1, 1) else ""
        return f"{p.height}×{p.width}×{p.inputs} → {p.outputs}, {p.kernel[0]}×{p.kernel[1]}{stride}{groups}"
    if call.family == "pointwise":
        return "×".join(map(str, p.shape))
    if call.family in ("pool", "resize", "patches"):
        return f"{p.height}×{p.width}×{p.channels} → {p.out_height}×{p.out_width}"
    if call.family == "reduce":
        return f"{p.rows}×{p.length}×{p.inner}" if p.inner > 1 else f"{p.rows}×{p.length}"
    if call.family == "attention":
        return f"{p.heads} heads, {p.tokens}×{p.keys}×{p.head}"
    return f"{p.batch}×{p.rows}×{p.columns}×{p.depth}" if call.family == "matmul" else ""


def estimate_layer(call: LayerCall, gpu: Gpu) -> LayerEstimate:
    """Return the prediction of one layer: as it is, and with its weight 2:4 where a kernel could use that."""
    p, sparse_us, why_not = call.problem, None, "" if call.weight is None else call.why_not_24
    if call.family == "gemm":
        extra = 2 * p.tokens * p.outputs if p.epilogue.residual else 0
        dense_us, bound = product_us(gpu, p.tokens, p.outputs, p.inputs, sparse=False, extra_bytes=extra)
        sparse_us, _ = product_us(gpu, p.tokens, p.outputs, p.inputs, sparse=True, extra_bytes=extra)
    elif call.family == "conv":
        dense_us, bound = _conv_us(gpu, p, sparse=False)
        sparse_us = _conv_us(gpu, p, sparse=True)[0] if call.eligible else None
    elif call.family == "fallback":
        dense_us, bound, why_not = 0.0, "unknown", "ONNX Runtime on the CPU: not predicted"
    else:
        share = OTHER_SHARE if call.family in ("attention", "matmul") else 1.0
        arithmetic = call.flops / (gpu.dense_tflops * share * 1e6) if share < 1.0 else 0.0
        dense_us, bound = _longer(gpu, arithmetic, call.num_bytes)
    # Kernels of grouped and depthwise convolutions apply every activation to what they have at hand.
    if call.family == "gemm" or (call.family == "conv" and p.groups == 1):
        rows = p.tokens if call.family == "gemm" else p.pixels
        after = _activation_us(gpu, p.epilogue.activation, rows * p.outputs)
        dense_us, sparse_us = dense_us + after, None if sparse_us is None else sparse_us + after
    if sparse_us is not None:
        why_not = "" if sparse_us < 0.98 * dense_us else f"bound by {'its launch' if bound == 'launch' else bound}, 2:4 would not help"
    return LayerEstimate(call.name, call.family, shape_text(call), call.flops, dense_us, sparse_us, bound, why_not)


def estimate_calls(calls: Sequence[LayerCall], gpu: Gpu, batch: int, precision: str) -> Estimate:
    """Return the prediction of lowered layers."""
    return Estimate(gpu.name, batch, precision, tuple(estimate_layer(call, gpu) for call in calls))


def estimate(
    path: str | Path,
    *,
    gpus: str | Sequence[str] = (),
    batch: int | Sequence[int] | None = None,
    precision: str = "fp16",
    fallback: bool = False,
) -> list[Estimate]:
    """Return what 2:4 would buy the ONNX file at `path`, one prediction a GPU and batch size, in that order.

    Every layer that a 2:4 kernel could compute is taken as if its weight were 2:4, whatever it holds now.

    Args:
        gpus: name or names of `builder.gpus.GPUS`; all by default. batch: batch size or sizes; by default the one that
            the file was exported for, else 1 and 32. fallback: leave operators that the engine lacks out of the sum.

    Raises:
        InputError: an unknown GPU, an unreadable file, a batch that it does not take. UnsupportedError: the network has operators that
            the engine lacks; with `fallback`, no other.
    """
    chosen = [gpu_named(name) for name in ((gpus,) if isinstance(gpus, str) else gpus)] or list(GPUS.values())
    sizes = batch_sizes(batch, "estimate")
    front = Front(path, fallback=fallback)
    lowered = [(size, front.lower(size, precision).calls) for size in sizes or front.default_batches(BATCHES)]
    refuse_nothing_ours(lowered[0][1], str(path))
    return [estimate_calls(calls, gpu, size, precision) for gpu in chosen for size, calls in lowered]


def refuse_nothing_ours(calls: Sequence[LayerCall], where: str) -> None:
    """Do nothing if the engine itself computes at least one layer.

    Raises:
        UnsupportedError: ONNX Runtime computes all of them, so that nothing could gain.
    """
    if all(call.family == "fallback" for call in calls):
        raise UnsupportedError(f"estimate: the engine has none of the operators of {where!r}, expected one; run it with ONNX Runtime")


def measured_error(rows: Sequence[dict[str, Any]], gpu: Gpu, *, sparse: bool) -> Error:
    """Return how far predictions are from the best measured time of each row of a `gemm` results file."""
    errors = []
    for row in rows:
        names = ("ours_us", "cusparselt_us") if sparse else ("ours_dense_us", "cublas_us")
        times = [row[name] for name in names if row[name]]
        if times:
            predicted, _ = product_us(gpu, row["tokens"], row["out"], row["in"], sparse=sparse)
            errors.append(abs(predicted / min(times) - 1))
    return Error.over(errors)


def networks_error(rows: Sequence[dict[str, Any]]) -> dict[str, Error]:
    """Return how far predictions of whole networks are from their measured times, and from what 2:4 bought them."""
    ratios = [[p / m for p, m in zip(row["predicted_ms"], row["measured_ms"], strict=True)] for row in rows]
    found = {"dense": [d for d, _ in ratios], "2:4": [s for _, s in ratios], "gain": [d / s for d, s in ratios]}
    return {kind: Error.over([abs(ratio - 1) for ratio in values]) for kind, values in found.items()}
