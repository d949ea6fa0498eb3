"""Convolutions, pools and resizing of images `[N, C, *spatial]`, in float64."""

from collections.abc import Sequence
from math import ceil, floor

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from twofour.errors import InputError
from twofour.oracle.operators.common import Array, Attributes, Inputs, Operator, given, needed, wide


def explicit_pads(
    sizes: Sequence[int], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int], attributes: Attributes
) -> list[int]:
    """Return `[begin…, end…]` of an operator that gives `pads` or `auto_pad`."""
    mode = attributes.get("auto_pad", "NOTSET")
    if mode in ("NOTSET", ""):
        return [int(p) for p in attributes.get("pads") or [0] * (2 * len(sizes))]
    if mode == "VALID":
        return [0] * (2 * len(sizes))
    # SAME: ceil(size / stride) outputs; the odd element goes to the end (UPPER) or the beginning (LOWER).
    totals = [max(0, (-(-n // s) - 1) * s + d * (k - 1) + 1 - n) for n, k, s, d in zip(sizes, kernel, strides, dilations, strict=True)]
    small, large = [t // 2 for t in totals], [t - t // 2 for t in totals]
    return small + large if mode == "SAME_UPPER" else large + small


def windows(x: Array, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int], outputs: Sequence[int]) -> Array:
    """Return `[N, C, *outputs, *kernel]`: the window of every output, from a padded `x`."""
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilations, strict=True)]
    view = sliding_window_view(x, reach, axis=tuple(range(2, x.ndim)))
    starts = tuple(slice(0, (o - 1) * s + 1, s) for o, s in zip(outputs, strides, strict=True))
    inside = tuple(slice(None, None, d) for d in dilations)
    return np.asarray(view[(slice(None), slice(None), *starts, *inside)])


def output_sizes(
    sizes: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    pads: Sequence[int],
    round_up: bool = False,
) -> list[int]:
    """Return the output's size on every spatial axis; rounding up drops a last window that would start beyond the input."""
    n = len(sizes)
    result = []
    for i in range(n):
        span = sizes[i] + pads[i] + pads[n + i] - dilations[i] * (kernel[i] - 1) - 1
        steps = ceil(span / strides[i]) if round_up else floor(span / strides[i])
        if round_up and steps * strides[i] >= sizes[i] + pads[i]:
            steps -= 1
        result.append(steps + 1)
    return result


def convolution(
    x: Array, weight: Array, bias: Array | None, strides: Sequence[int], pads: Sequence[int], dilations: Sequence[int], groups: int
) -> Array:
    """Return `y[n, k, o] = sum over c, r of x[n, c, o·stride + r·dilation - pad] · w[k, c, r] + b[k]`, groups apart.

    Args:
        x: `[N, C, *spatial]`. weight: `[K, C / groups, *kernel]`. bias: `[K]`. pads: `[begin…, end…]`.
    """
    n, kernel = x.ndim - 2, weight.shape[2:]
    outputs = output_sizes(x.shape[2:], kernel, strides, dilations, pads)
    padded = np.pad(wide(x), [(0, 0), (0, 0), *zip(pads[:n], pads[n:], strict=True)])
    seen = windows(padded, kernel, strides, dilations, outputs)
    out = np.empty((x.shape[0], weight.shape[0], *outputs))
    channels, rows = weight.shape[1], weight.shape[0] // groups
    for group in range(groups):
        part = seen[:, group * channels : (group + 1) * channels]
        columns = np.moveaxis(part, 1, 1 + n).reshape(x.shape[0], *outputs, -1)
        w = wide(weight[group * rows : (group + 1) * rows]).reshape(rows, -1)
        out[:, group * rows : (group + 1) * rows] = np.moveaxis(columns @ w.T, -1, 1)
    return out if bias is None else out + wide(bias).reshape(1, -1, *[1] * n)


def run_conv(inputs: Inputs, attributes: Attributes, _count: int) -> list[Array]:
    """Conv."""
    x, weight = needed(inputs, 0), needed(inputs, 1)
    n = x.ndim - 2
    strides, dilations = list(attributes.get("strides") or [1] * n), list(attributes.get("dilations") or [1] * n)
    pads = explicit_pads(x.shape[2:], weight.shape[2:], strides, dilations, attributes)
    return [convolution(x, weight, given(inputs, 2), strides, pads, dilations, int(attributes.get("group", 1)))]


def pool(
    x: Array,
    kind: str,
    kernel: Sequence[int],
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int],
    *,
    count_pads: bool = False,
    round_up: bool = False,
) -> Array:
    """Return the largest or the mean of every window of `[N, C, *spatial]`; padding never is the largest.

    A mean divides by the elements inside the image, with `count_pads` by those inside image and padding.
    """
    n, x = x.ndim - 2, wide(x)
    outputs = output_sizes(x.shape[2:], kernel, strides, dilations, pads, round_up)
    reach = [(o - 1) * s + d * (k - 1) + 1 for o, s, d, k in zip(outputs, strides, dilations, kernel, strict=True)]
    ends = [max(pads[n + i], reach[i] - x.shape[2 + i] - pads[i]) for i in range(n)]
    margin = [(0, 0), (0, 0), *zip(pads[:n], ends, strict=True)]
    if kind == "max":
        seen = windows(np.pad(x, margin, constant_values=-np.inf), kernel, strides, dilations, outputs)
        return np.asarray(seen.max(axis=tuple(range(2 + n, 2 + 2 * n))))
    counted = np.ones((1, 1, *x.shape[2:]))
    if count_pads:
        counted = np.pad(counted, [(0, 0), (0, 0), *zip(pads[:n], pads[n:], strict=True)], constant_values=1.0)
        counted = np.pad(counted, [(0, 0), (0, 0), *((0, e - p) for e, p in zip(ends, pads[n:], strict=True))])
    else:
        counted = np.pad(counted, margin)
    axes = tuple(range(2 + n, 2 + 2 * n))
    total = windows(np.pad(x, margin), kernel, strides, dilations, outputs).sum(axis=axes)
    return np.asarray(total / windows(counted, kernel, strides, dilations, outputs).sum(axis=axes))


def run_pool(kind: str) -> Operator:
    """Return MaxPool or AveragePool (first output only)."""

    def run(inputs: Inputs, attributes: Attributes, count: int) -> list[Array]:
        if count > 1:
            raise InputError(f"oracle: {kind} pooling has one output here, {count} were asked for")
        x, kernel = needed(inputs, 0), [int(k) for k in attributes["kernel_shape"]]
        n = x.ndim - 2
        strides, dilations = list(attributes.get("strides") or [1] * n), list(attributes.get("dilations") or [1] * n)
        pads = explicit_pads(x.shape[2:], kernel, strides, dilations, attributes)
        count_pads, round_up = bool(attributes.get("count_include_pad", 0)), bool(attributes.get("ceil_mode", 0))
        return [pool(x, kind, kernel, strides, pads, dilations, count_pads=count_pads, round_up=round_up)]

    return run


def global_pool(kind: str) -> Operator:
    """Return GlobalAveragePool or GlobalMaxPool."""

    def run(inputs: Inputs, _attributes: Attributes, _count: int) -> list[Array]:
        x = wide(needed(inputs, 0))
        axes = tuple(range(2, x.ndim))
        return [np.asarray(x.mean(axis=axes, keepdims=True) if kind == "average" else x.max(axis=axes, keepdims=True))]

    return run


def source_position(mode: str, out: int, size: int, new_size: int, scale: float) -> float:
    """Return where output `out` lies on the input's axis. Source: ONNX operator Resize, coordinate_transformation_mode."""
    if mode == "half_pixel":
        return (out + 0.5) / scale - 0.5
    if mode == "pytorch_half_pixel":
        return (out + 0.5) / scale - 0.5 if new_size > 1 else 0.0
    if mode == "align_corners":
        return out * (size - 1) / (new_size - 1) if new_size > 1 else 0.0
    if mode == "asymmetric":
        return out / scale
    raise InputError(
        f"oracle: Resize has the coordinate mode {mode!r}, expected half_pixel, pytorch_half_pixel, align_corners or asymmetric"
    )


NEAREST = {
    "round_prefer_floor": lambda p: ceil(p - 0.5),
    "round_prefer_ceil": lambda p: floor(p + 0.5),
    "floor": floor,
    "ceil": ceil,
}


def cubic_weights(fraction: float, a: float) -> list[float]:
    """Return the four weights of Keys' cubic convolution for the neighbours at -1, 0, 1, 2."""
    weights = []
    for distance in (1 + fraction, fraction, 1 - fraction, 2 - fraction):
        if distance <= 1:
            weights.append((a + 2) * distance**3 - (a + 3) * distance**2 + 1)
        else:
            weights.append(a * distance**3 - 5 * a * distance**2 + 8 * a * distance - 4 * a)
    return weights


def resize_matrix(
    size: int, new_size: int, scale: float, mode: str, coordinates: str, nearest_mode: str = "round_prefer_floor", cubic_a: float = -0.75
) -> Array:
    """Return `[new_size, size]`: how much every input contributes to every output along one axis."""
    matrix = np.zeros((new_size, size))
    for out in range(new_size):
        position = source_position(coordinates, out, size, new_size, scale)
        if mode == "nearest":
            matrix[out, min(max(NEAREST[nearest_mode](position), 0), size - 1)] = 1.0
            continue
        low = floor(position)
        fraction = position - low
        taps = (
            [(0, 1 - fraction), (1, fraction)]
            if mode == "linear"
            else list(zip((-1, 0, 1, 2), cubic_weights(fraction, cubic_a), strict=True))
        )
        for offset, weight in taps:
            matrix[out, min(max(low + offset, 0), size - 1)] += weight
    return matrix


def run_resize(inputs: Inputs, attributes: Attributes, _count: int) -> list[Array]:
    """Resize by nearest neighbour, linear or cubic interpolation, separable."""
    x, scales, sizes = wide(needed(inputs, 0)), given(inputs, 2), given(inputs, 3)
    axes = [int(a) % x.ndim for a in attributes.get("axes") or range(x.ndim)]
    if attributes.get("antialias", 0) or attributes.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise InputError("oracle: Resize with antialias or a kept aspect ratio is not computed here")
    if sizes is not None and sizes.size:
        new = [int(s) for s in sizes]
        factors = [n / x.shape[a] for n, a in zip(new, axes, strict=True)]
    else:
        assert scales is not None
        factors = [float(s) for s in scales]
        new = [floor(x.shape[a] * f) for f, a in zip(factors, axes, strict=True)]
    mode, coordinates = attributes.get("mode", "nearest"), attributes.get("coordinate_transformation_mode", "half_pixel")
    nearest, a = attributes.get("nearest_mode", "round_prefer_floor"), attributes.get("cubic_coeff_a", -0.75)
    for axis, size, factor in zip(axes, new, factors, strict=True):
        if size != x.shape[axis] or factor != 1.0:
            matrix = resize_matrix(x.shape[axis], size, factor, mode, coordinates, nearest, a)
            x = np.moveaxis(np.tensordot(matrix, x, axes=(1, axis)), 0, axis)
    return [x]


def run_lrn(inputs: Inputs, attributes: Attributes, _count: int) -> list[Array]:
    """LRN: `y = x / (bias + alpha / size · sum of x² over a window of channels)^beta`."""
    x, size = wide(needed(inputs, 0)), int(attributes["size"])
    alpha, beta, bias = attributes.get("alpha", 1e-4), attributes.get("beta", 0.75), attributes.get("bias", 1.0)
    before = (size - 1) // 2
    squares = np.pad(x * x, [(0, 0), (before, size - 1 - before), *[(0, 0)] * (x.ndim - 2)])
    total = sliding_window_view(squares, size, axis=1).sum(-1)
    return [x / (bias + alpha / size * total) ** beta]


def run_depth_to_space(inputs: Inputs, attributes: Attributes, _count: int) -> list[Array]:
    """DepthToSpace in DCR or CRD order."""
    x, b = needed(inputs, 0), int(attributes["blocksize"])
    n, c, h, w = x.shape
    if attributes.get("mode", "DCR") == "DCR":
        y = x.reshape(n, b, b, c // (b * b), h, w).transpose(0, 3, 4, 1, 5, 2)
    else:
        y = x.reshape(n, c // (b * b), b, b, h, w).transpose(0, 1, 4, 2, 5, 3)
    return [y.reshape(n, c // (b * b), h * b, w * b)]


def run_space_to_depth(inputs: Inputs, attributes: Attributes, _count: int) -> list[Array]:
    """SpaceToDepth."""
    x, b = needed(inputs, 0), int(attributes["blocksize"])
    n, c, h, w = x.shape
    return [x.reshape(n, c, h // b, b, w // b, b).transpose(0, 3, 5, 1, 2, 4).reshape(n, c * b * b, h // b, w // b)]


WINDOWS: dict[str, Operator] = {
    "Conv": run_conv,
    "MaxPool": run_pool("max"),
    "AveragePool": run_pool("average"),
    "GlobalAveragePool": global_pool("average"),
    "GlobalMaxPool": global_pool("max"),
    "Resize": run_resize,
    "LRN": run_lrn,
    "DepthToSpace": run_depth_to_space,
    "SpaceToDepth": run_space_to_depth,
}
