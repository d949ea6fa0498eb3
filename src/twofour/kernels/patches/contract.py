"""The contract of the patches family: each block of an image's pixels becomes one pixel of many channels.

    Y[n, i, j, (a * block_w + b) * channels + c] = X[n, i * block_h + a - top, j * block_w + b - left, c]

with zeros where X ends and in the channels behind the last one. A convolution of few channels and stride `block` becomes one of many
channels and stride 1, which tensor cores compute well. Everything here is a pure function of plain values.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from twofour.errors import InputError
from twofour.kernels.operands import DTYPE_BYTES, FLOAT16, MAX_ELEMS, Footprint, check_align, check_config, check_dtype, check_sizes

DTYPES = (*FLOAT16, "fp32")
THREADS = 256
VECTORS = (16, 8)
MOST_CHANNELS = 4096  # of Y


@dataclass(frozen=True)
class Problem:
    """One gathering as asked.

    Attributes:
        batch, height, width, channels: of X. out_height, out_width: of Y, in blocks. block: (rows, columns) of a block.
        out_channels: of Y, a multiple of 8. top, left: rows and columns of zeros above and left of X.
        dtype, out_dtype: of X and Y. x_strides: elements of X from image to image, row to row, column to column, channel to channel.
        align: bytes that X's address is a multiple of; Y's is one of 16.
    """

    batch: int
    height: int
    width: int
    channels: int
    out_height: int
    out_width: int
    out_channels: int
    x_strides: tuple[int, int, int, int]
    block: tuple[int, int] = (1, 1)
    top: int = 0
    left: int = 0
    dtype: str = "fp32"
    out_dtype: str = "fp16"
    align: int = 16

    def __post_init__(self) -> None:
        check_sizes(1, batch=self.batch, height=self.height, width=self.width, channels=self.channels)
        check_sizes(1, out_height=self.out_height, out_width=self.out_width, out_channels=self.out_channels)
        check_sizes(1, block_height=self.block[0], block_width=self.block[1])
        check_sizes(0, top=self.top, left=self.left)
        check_dtype("dtype", self.dtype, DTYPES)
        check_dtype("out_dtype", self.out_dtype, DTYPES)
        check_align(align=self.align)
        if any(isinstance(s, bool) or not isinstance(s, int) or not 0 <= s <= MAX_ELEMS for s in self.x_strides):
            raise InputError(f"x_strides are {list(self.x_strides)}, expected four whole numbers from 0 to {MAX_ELEMS}")
        if self.out_channels % 8 or not self.filled <= self.out_channels <= MOST_CHANNELS:
            raise InputError(
                f"out_channels is {self.out_channels}, expected a multiple of 8 from the {self.filled} of a block to {MOST_CHANNELS}"
            )
        if max(self.x_elements, self.y_elements) > MAX_ELEMS:
            raise InputError(f"an image of {max(self.x_elements, self.y_elements)} elements, expected at most {MAX_ELEMS}")

    @property
    def filled(self) -> int:
        """Channels of Y that hold pixels."""
        return self.block[0] * self.block[1] * self.channels

    @property
    def x_elements(self) -> int:
        """Elements from the first to behind the last one of X."""
        sizes = (self.batch, self.height, self.width, self.channels)
        return 1 + sum((n - 1) * s for n, s in zip(sizes, self.x_strides, strict=True))

    @property
    def y_elements(self) -> int:
        """Elements of Y."""
        return self.batch * self.out_height * self.out_width * self.out_channels

    @property
    def flops(self) -> int:
        """None: elements are moved."""
        return 0

    @property
    def num_bytes(self) -> int:
        """Bytes of X and Y, each once."""
        return (
            DTYPE_BYTES[self.dtype] * self.batch * self.height * self.width * self.channels + DTYPE_BYTES[self.out_dtype] * self.y_elements
        )


@dataclass(frozen=True, order=True)
class Config:
    """One way to compute a Problem: channels of Y that a thread gathers."""

    vector: int = 8


@dataclass(frozen=True)
class Launch:
    """Integers that follow: threads' worth of work, and whether indices need 64 bits."""

    grid: int
    threads: int
    groups: int
    wide: bool


def why_not(problem: Problem, config: Config) -> str | None:
    """Return why `config` cannot compute `problem`, or None when it can."""
    if config.vector not in VECTORS:
        return f"vector {config.vector}, expected one of {', '.join(map(str, VECTORS))}"
    if problem.out_channels % config.vector:
        return f"{problem.out_channels} channels, expected a multiple of {config.vector}"
    return None


def derive(problem: Problem, config: Config, num_sms: int = 132) -> Launch:
    """Return the Launch of `config` for `problem`.

    Raises:
        InputError: `why_not` has a reason.
    """
    check_config(problem, config, why_not(problem, config))
    groups = problem.y_elements // config.vector
    wide = max(problem.x_elements, problem.y_elements) > 2**31 - 1
    return Launch(max(1, min(-(-groups // THREADS), num_sms * 256)), THREADS, groups, wide)


def candidates(problem: Problem, num_sms: int = 132) -> Sequence[Config]:
    """Return the legal configs worth timing, the believed best first."""
    return [c for c in map(Config, VECTORS) if why_not(problem, c) is None]


def default(problem: Problem, num_sms: int = 132) -> Config:
    """Return the config believed fastest, without timing anything."""
    return candidates(problem, num_sms)[0]


def footprints(problem: Problem) -> dict[str, Footprint]:
    """Return what a launch touches: `x` and `d`."""
    return {
        "x": Footprint(problem.dtype, problem.x_elements, problem.align),
        "d": Footprint(problem.out_dtype, problem.y_elements, writes=True),
    }
