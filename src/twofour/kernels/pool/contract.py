"""The contract of the pooling family: windows of an NHWC image reduced to their largest or mean value, and images resized.

    max:      Y[n, p, q, c] = max over the window of X
    average:  Y[n, p, q, c] = sum over the window of X / how many places count

Everything here is a pure function of plain values.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor

from twofour.errors import InputError, nearest
from twofour.kernels.operands import (
    DTYPE_BYTES,
    FLOAT16,
    Footprint,
    check_align,
    check_config,
    check_dtype,
    check_pitch,
    check_sizes,
    vector_elems,
)

KINDS = ("max", "average")
RESIZE_KINDS = ("nearest", "linear")
COORDINATES = ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric")
ROUNDINGS = ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")
DTYPES = (*FLOAT16, "fp32")
THREADS = 256
MOST_UNROLLED = 16  # window places whose loads are in flight together; more of them spill registers


@dataclass(frozen=True)
class Problem:
    """One pooling as asked.

    Attributes:
        batch, height, width, channels: of X. kind: one of `KINDS`.
        kernel, strides, dilations: (vertical, horizontal). pads: (top, left, bottom, right).
        count_include_pad: whether padded places count in an average.
        ceil: rows and columns of padding below and to the right that only round the output's size up; they never count.
        x_pitch, y_pitch: elements from pixel to pixel; None: they follow each other. align, out_align: bytes of the addresses.
    """

    batch: int
    height: int
    width: int
    channels: int
    kind: str
    kernel: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilations: tuple[int, int] = (1, 1)
    count_include_pad: bool = False
    ceil: tuple[int, int] = (0, 0)
    dtype: str = "fp16"
    x_pitch: int | None = None
    y_pitch: int | None = None
    align: int = 16
    out_align: int = 16

    def __post_init__(self) -> None:
        check_sizes(1, batch=self.batch, height=self.height, width=self.width, channels=self.channels)
        check_sizes(1, kernel_height=self.kernel[0], kernel_width=self.kernel[1])
        check_sizes(1, stride_height=self.strides[0], stride_width=self.strides[1])
        check_sizes(1, dilation_height=self.dilations[0], dilation_width=self.dilations[1])
        check_sizes(0, **dict(zip(("pad_top", "pad_left", "pad_bottom", "pad_right"), self.pads, strict=True)))
        check_sizes(0, ceil_height=self.ceil[0], ceil_width=self.ceil[1])
        if self.kind not in KINDS:
            raise InputError(f"kind {self.kind!r} is not one of {', '.join(KINDS)}{nearest(str(self.kind), KINDS)}")
        check_dtype("dtype", self.dtype, DTYPES)
        check_align(align=self.align, out_align=self.out_align)
        check_pitch("x_pitch", self.x_pitch, self.channels)
        check_pitch("y_pitch", self.y_pitch, self.channels)
        if min(self.out_height, self.out_width) < 1:
            raise InputError(
                f"a window of {self.kernel[0]}x{self.kernel[1]} does not fit {self.height}x{self.width} pixels with pads {self.pads}; "
                "use a larger image"
            )
        for name, size, reach in (("height", self.height, 0), ("width", self.width, 1)):
            # A window wholly outside the image would have no value.
            kernel, step = self.dilations[reach] * (self.kernel[reach] - 1) + 1, self.strides[reach]
            out = (self.out_height, self.out_width)[reach]
            if self.pads[reach] >= kernel or (out - 1) * step - self.pads[reach] >= size:
                raise InputError(
                    f"pads {self.pads} give windows without a pixel along the {name}, expected pads below the kernel {self.kernel}"
                )

    @property
    def out_height(self) -> int:
        """Rows of Y."""
        padded = self.height + self.pads[0] + self.pads[2] + self.ceil[0]
        return (padded - self.dilations[0] * (self.kernel[0] - 1) - 1) // self.strides[0] + 1

    @property
    def out_width(self) -> int:
        """Columns of Y."""
        padded = self.width + self.pads[1] + self.pads[3] + self.ceil[1]
        return (padded - self.dilations[1] * (self.kernel[1] - 1) - 1) // self.strides[1] + 1

    @property
    def flops(self) -> int:
        """One an output element and window place."""
        return self.batch * self.out_height * self.out_width * self.channels * self.kernel[0] * self.kernel[1]

    @property
    def num_bytes(self) -> int:
        """Bytes of X and Y, each once."""
        return _bytes(self)


@dataclass(frozen=True)
class ResizeProblem:
    """One resizing as asked (ONNX Resize of NHWC images).

    Attributes:
        batch, height, width, channels: of X. out_height, out_width: of Y.
        kind: one of `RESIZE_KINDS`. coordinate: one of `COORDINATES`, where an output pixel lies in X. rounding: of `nearest`.
        scales: (vertical, horizontal) output over input size as the model gave it; None: out_height / height and so on.
    """

    batch: int
    height: int
    width: int
    channels: int
    out_height: int
    out_width: int
    kind: str = "linear"
    coordinate: str = "half_pixel"
    rounding: str = "round_prefer_floor"
    scales: tuple[float, float] | None = None
    dtype: str = "fp16"
    x_pitch: int | None = None
    y_pitch: int | None = None
    align: int = 16
    out_align: int = 16

    def __post_init__(self) -> None:
        check_sizes(1, batch=self.batch, height=self.height, width=self.width, channels=self.channels)
        check_sizes(1, out_height=self.out_height, out_width=self.out_width)
        for name, value, known in (
            ("kind", self.kind, RESIZE_KINDS),
            ("coordinate", self.coordinate, COORDINATES),
            ("rounding", self.rounding, ROUNDINGS),
        ):
            if value not in known:
                raise InputError(f"{name} {value!r} is not one of {', '.join(known)}{nearest(str(value), known)}")
        if self.scales is not None and not all(2.0**-20 <= s <= 2.0**20 for s in self.scales):
            raise InputError(f"scales are {self.scales}, expected positive numbers")
        check_dtype("dtype", self.dtype, DTYPES)
        check_align(align=self.align, out_align=self.out_align)
        check_pitch("x_pitch", self.x_pitch, self.channels)
        check_pitch("y_pitch", self.y_pitch, self.channels)

    @property
    def steps(self) -> tuple[float, float]:
        """Input pixels an output pixel, (vertical, horizontal), as the coordinate mode takes them."""
        if self.coordinate == "align_corners":
            return _corner_step(self.height, self.out_height), _corner_step(self.width, self.out_width)
        if self.scales is not None:
            return 1.0 / self.scales[0], 1.0 / self.scales[1]
        return self.height / self.out_height, self.width / self.out_width

    @property
    def flops(self) -> int:
        """Eight an output element for `linear`, none for `nearest`."""
        return self.batch * self.out_height * self.out_width * self.channels * (8 if self.kind == "linear" else 0)

    @property
    def num_bytes(self) -> int:
        """Bytes of X and Y, each once."""
        return _bytes(self)


AnyProblem = Problem | ResizeProblem


def _corner_step(size: int, out: int) -> float:
    return (size - 1) / (out - 1) if out > 1 else 0.0


def _bytes(p: AnyProblem) -> int:
    return DTYPE_BYTES[p.dtype] * p.batch * p.channels * (p.height * p.width + p.out_height * p.out_width)


def source_place(problem: ResizeProblem, axis: int, index: int) -> float:
    """Return where output pixel `index` of `axis` (0: rows, 1: columns) lies in X. Source: ONNX operator Resize."""
    step = problem.steps[axis]
    out = (problem.out_height, problem.out_width)[axis]
    if problem.coordinate == "half_pixel":
        return (index + 0.5) * step - 0.5
    if problem.coordinate == "pytorch_half_pixel":
        return (index + 0.5) * step - 0.5 if out > 1 else 0.0
    return index * step


def nearest_pixel(problem: ResizeProblem, axis: int, index: int) -> int:
    """Return the pixel of X that `nearest` takes for output pixel `index`."""
    place = source_place(problem, axis, index)
    rounded = {
        "floor": floor(place),
        "ceil": ceil(place),
        "round_prefer_floor": ceil(place - 0.5),
        "round_prefer_ceil": floor(place + 0.5),
    }[problem.rounding]
    return min(max(rounded, 0), (problem.height, problem.width)[axis] - 1)


@dataclass(frozen=True, order=True)
class Config:
    """One way to compute a Problem: neighbouring channels a thread moves at once, and output columns a thread computes."""

    vector: int = 8
    columns: int = 1


@dataclass(frozen=True)
class Launch:
    """Integers that follow: `groups` threads' worth of work, channel groups of a pixel, column groups of a row."""

    grid: int
    threads: int
    groups: int
    channel_groups: int
    column_groups: int
    wide: bool


def why_not(problem: AnyProblem, config: Config) -> str | None:
    """Return why `config` cannot compute `problem`, or None when it can."""
    if config.vector not in (1, 2, 4, 8) or config.columns not in (1, 2):
        return f"vector {config.vector} and columns {config.columns}: expected 1, 2, 4 or 8 and 1 or 2"
    if isinstance(problem, ResizeProblem) and config.columns != 1:
        return "a resize computes one column a thread"
    size = DTYPE_BYTES[problem.dtype]
    step = min(16, config.vector * size)
    if problem.channels % config.vector:
        return f"{problem.channels} channels, expected a multiple of {config.vector}"
    if config.vector > 1 and any(pitch * size % step for pitch in _pitches(problem)):
        return f"pixels lie {' and '.join(map(str, _pitches(problem)))} elements apart, expected multiples of {step} bytes"
    if config.vector > 1 and (problem.align % step or problem.out_align % step):
        return f"addresses are multiples of {problem.align} and {problem.out_align} bytes, expected {step}"
    return None


def _pitches(problem: AnyProblem) -> tuple[int, int]:
    return problem.x_pitch or problem.channels, problem.y_pitch or problem.channels


def derive(problem: AnyProblem, config: Config, num_sms: int = 132) -> Launch:
    """Return the Launch of `config` for `problem`.

    Raises:
        InputError: `why_not` has a reason.
    """
    check_config(problem, config, why_not(problem, config))
    channel_groups, column_groups = problem.channels // config.vector, ceil_div(problem.out_width, config.columns)
    groups = problem.batch * problem.out_height * column_groups * channel_groups
    touched = footprints(problem)
    wide = groups > 2**31 - 1 or max(f.elements for f in touched.values()) > 2**31 - 1
    return Launch(max(1, min(ceil_div(groups, THREADS), num_sms * 256)), THREADS, groups, channel_groups, column_groups, wide)


def ceil_div(a: int, b: int) -> int:
    """Return a / b rounded up."""
    return -(-a // b)


def candidates(problem: AnyProblem, num_sms: int = 132) -> Sequence[Config]:
    """Return the legal configs worth timing, the believed best first."""
    pitches = _pitches(problem)
    align = min(problem.align, problem.out_align)
    vector = next(v for v in (8, 4, 2, 1) if vector_elems(problem.channels, align, problem.dtype) >= v and all(p % v == 0 for p in pitches))
    columns = (1,) if isinstance(problem, ResizeProblem) else (1, 2)
    return [c for c in (Config(vector, n) for n in columns) if why_not(problem, c) is None]


def default(problem: AnyProblem, num_sms: int = 132) -> Config:
    """Return the config believed fastest, without timing anything."""
    return candidates(problem, num_sms)[0]


def footprints(problem: AnyProblem) -> dict[str, Footprint]:
    """Return what a launch touches: `x` and `d`."""
    x_pitch, y_pitch = _pitches(problem)
    pixels, out = problem.batch * problem.height * problem.width, problem.batch * problem.out_height * problem.out_width
    return {
        "x": Footprint(problem.dtype, (pixels - 1) * x_pitch + problem.channels, problem.align),
        "d": Footprint(problem.dtype, (out - 1) * y_pitch + problem.channels, problem.out_align, writes=True),
    }
