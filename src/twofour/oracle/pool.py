"""Pooling and resizing of NHWC images, in float64."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def pool(
    x: Array,
    kind: str,
    kernel: tuple[int, int],
    strides: tuple[int, int] = (1, 1),
    pads: tuple[int, int, int, int] = (0, 0, 0, 0),
    dilations: tuple[int, int] = (1, 1),
    *,
    count_include_pad: bool = False,
    ceil: tuple[int, int] = (0, 0),
) -> Array:
    """Return the largest or mean value of every window of x `[batch, height, width, channels]`.

    pads are (top, left, bottom, right); rows and columns of `ceil` round the output's size up and never count.
    """
    x = np.asarray(x, np.float64)
    (height, width), (top, left, bottom, right) = x.shape[1:3], pads
    out_height = (height + top + bottom + ceil[0] - dilations[0] * (kernel[0] - 1) - 1) // strides[0] + 1
    out_width = (width + left + right + ceil[1] - dilations[1] * (kernel[1] - 1) - 1) // strides[1] + 1
    y = np.empty((x.shape[0], out_height, out_width, x.shape[3]))
    for p in range(out_height):
        for q in range(out_width):
            rows = [p * strides[0] - top + r * dilations[0] for r in range(kernel[0])]
            columns = [q * strides[1] - left + s * dilations[1] for s in range(kernel[1])]
            inside = [(h, w) for h in rows if 0 <= h < height for w in columns if 0 <= w < width]
            values = np.stack([x[:, h, w] for h, w in inside])
            if kind == "max":
                y[:, p, q] = values.max(0)
            elif count_include_pad:
                padded = sum(-top <= h < height + bottom and -left <= w < width + right for h in rows for w in columns)
                y[:, p, q] = values.sum(0) / padded
            else:
                y[:, p, q] = values.mean(0)
    return y


def resize(
    x: Array,
    out_height: int,
    out_width: int,
    kind: str = "linear",
    coordinate: str = "half_pixel",
    rounding: str = "round_prefer_floor",
    scales: tuple[float, float] | None = None,
) -> Array:
    """Return x `[batch, height, width, channels]` resized. Source: ONNX operator Resize."""
    x = np.asarray(x, np.float64)
    sizes, outs = x.shape[1:3], (out_height, out_width)
    places = []
    for axis in range(2):
        size, out = sizes[axis], outs[axis]
        index = np.arange(out, dtype=np.float64)
        step = 1.0 / scales[axis] if scales else size / out
        if coordinate == "align_corners":
            place = index * ((size - 1) / (out - 1) if out > 1 else 0.0)
        elif coordinate == "asymmetric":
            place = index * step
        elif coordinate == "pytorch_half_pixel" and out == 1:
            place = index * 0.0
        else:
            place = (index + 0.5) * step - 0.5
        places.append(place)
    if kind == "nearest":
        turn: dict[str, Callable[[Array], Any]] = {
            "floor": np.floor,
            "ceil": np.ceil,
            "round_prefer_floor": lambda p: np.ceil(p - 0.5),
            "round_prefer_ceil": lambda p: np.floor(p + 0.5),
        }
        rows, columns = (np.clip(turn[rounding](p), 0, n - 1).astype(int) for p, n in zip(places, sizes, strict=True))
        return np.asarray(x[:, rows][:, :, columns])
    for axis in range(2):
        place = np.clip(places[axis], 0, sizes[axis] - 1)
        low = np.floor(place).astype(int)
        high = np.minimum(low + 1, sizes[axis] - 1)
        weight = (place - low).reshape((-1, 1, 1) if axis == 0 else (-1, 1))
        x = np.take(x, low, 1 + axis) * (1 - weight) + np.take(x, high, 1 + axis) * weight
    return x
