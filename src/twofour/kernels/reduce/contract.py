"""The contract of the reduction family: sums over an axis, and normalisations along the last one, in fp32.

    mean, sum, max, l2:  Y[r, i] = reduction over l of X[r, l, i]        (l2: sqrt(sum of squares))
    softmax:             Y[r, l] = exp(X[r, l] - max) / sum exp
    layernorm:           Y[r, l] = (X - mean) / sqrt(variance + eps) * scale[l] + bias[l]
    rmsnorm:             Y[r, l] = X / sqrt(mean of squares + eps) * scale[l]

Everything here is a pure function of plain values.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from twofour.errors import InputError, nearest
from twofour.kernels.operands import (
    DTYPE_BYTES,
    FLOAT16,
    MAX_ELEMS,
    Footprint,
    check_align,
    check_config,
    check_dtype,
    check_pitch,
    check_sizes,
    vector_elems,
)

REDUCTIONS = ("mean", "sum", "max", "l2")
NORMALISATIONS = ("softmax", "layernorm", "rmsnorm")
KINDS = REDUCTIONS + NORMALISATIONS
DTYPES = (*FLOAT16, "fp32")
ROW_THREADS = (32, 128, 256, 512)  # threads that share a row
MOST_KEPT = 8  # vectors of a row a thread keeps in registers; longer rows are read again
BLOCK_THREADS = 256


@dataclass(frozen=True)
class Problem:
    """One reduction as asked.

    Attributes:
        rows, length, inner: X is `[rows, length, inner]`; `length` is reduced or normalised along, `inner` is 1 for normalisations.
        kind: one of `KINDS`. eps: inside the root of the norms.
        scale, bias: whether the norms multiply and add fp32 vectors `[length]`; `bias` with layernorm only.
        x_pitch: elements from line to line, a line being `inner` neighbours where inner > 1, else a row; None: they follow each other.
        y_pitch: elements from row to row of Y (rows of `inner` or `length`).
    """

    rows: int
    length: int
    kind: str
    eps: float = 0.0
    dtype: str = "fp16"
    out_dtype: str = "fp16"
    inner: int = 1
    scale: bool = False
    bias: bool = False
    x_pitch: int | None = None
    y_pitch: int | None = None
    align: int = 16
    out_align: int = 16

    def __post_init__(self) -> None:
        check_sizes(1, rows=self.rows, length=self.length, inner=self.inner)
        if self.kind not in KINDS:
            raise InputError(f"kind {self.kind!r} is not one of {', '.join(KINDS)}{nearest(str(self.kind), KINDS)}")
        check_dtype("dtype", self.dtype, DTYPES)
        check_dtype("out_dtype", self.out_dtype, DTYPES)
        check_align(align=self.align, out_align=self.out_align)
        if self.is_normalisation and self.inner != 1:
            raise InputError(f"{self.kind} with inner {self.inner}: expected 1, it works along the last axis; transpose first")
        if (self.scale and self.kind not in ("layernorm", "rmsnorm")) or (self.bias and self.kind != "layernorm"):
            raise InputError(f"{self.kind} takes no scale or bias of this kind; only layernorm has both, rmsnorm a scale")
        if not 0.0 <= self.eps <= 1.0:
            raise InputError(f"eps is {self.eps}, expected a small number from 0 to 1")
        check_pitch("x_pitch", self.x_pitch, self.inner if self.inner > 1 else self.length)
        check_pitch("y_pitch", self.y_pitch, self.out_length)
        if self.rows * self.length * self.inner > MAX_ELEMS:
            raise InputError(f"{self.rows} x {self.length} x {self.inner} elements, expected at most {MAX_ELEMS}")

    @property
    def is_normalisation(self) -> bool:
        """Whether Y has the shape of X."""
        return self.kind in NORMALISATIONS

    @property
    def out_length(self) -> int:
        """Elements of a row of Y."""
        return self.length if self.is_normalisation else self.inner

    @property
    def flops(self) -> int:
        """One an element of X, eight for a normalisation."""
        return self.rows * self.length * self.inner * (8 if self.is_normalisation else 1)

    @property
    def num_bytes(self) -> int:
        """Bytes of X and Y, each once."""
        return self.rows * (self.length * self.inner * DTYPE_BYTES[self.dtype] + self.out_length * DTYPE_BYTES[self.out_dtype])


@dataclass(frozen=True, order=True)
class Config:
    """One way to compute a Problem.

    Attributes:
        kernel: "rows" where the reduced axis is the last (inner 1), else "columns".
        vector: neighbouring elements a thread moves at once.
        threads: "rows": that share a row, one of `ROW_THREADS`. "columns": side by side along `inner`, 1 to `BLOCK_THREADS`;
            the others of a block share the reduced axis.
    """

    kernel: str = "rows"
    vector: int = 8
    threads: int = 32


@dataclass(frozen=True)
class Launch:
    """Integers that follow.

    Attributes:
        kept: vectors of a row a thread keeps in registers ("rows"); 0: the row is read again for each pass.
        column_blocks: thread blocks along `inner` ("columns").
    """

    grid: int
    threads: int
    smem_bytes: int
    kept: int
    column_blocks: int


def why_not(problem: Problem, config: Config) -> str | None:
    """Return why `config` cannot compute `problem`, or None when it can."""
    if config.kernel not in ("rows", "columns"):
        return f"kernel {config.kernel!r} is not one of rows, columns"
    if config.vector not in (1, 2, 4, 8):
        return f"vector {config.vector} is not one of 1, 2, 4, 8"
    if (problem.inner > 1) != (config.kernel == "columns"):
        return f"inner is {problem.inner}, expected {'1' if config.kernel == 'rows' else 'more than 1'} for the kernel {config.kernel!r}"
    if config.kernel == "rows" and config.threads not in ROW_THREADS:
        return f"{config.threads} threads a row, expected one of {ROW_THREADS}"
    if config.kernel == "columns" and (config.threads < 1 or BLOCK_THREADS % config.threads):
        return f"{config.threads} threads side by side, expected a divisor of {BLOCK_THREADS}"
    if config.vector == 1:
        return None
    size, out_size = DTYPE_BYTES[problem.dtype], DTYPE_BYTES[problem.out_dtype]
    line = problem.inner if problem.inner > 1 else problem.length
    writes_vectors = problem.is_normalisation or problem.inner > 1
    for name, pitch, step, align in (
        ("x", problem.x_pitch or line, min(16, config.vector * size), problem.align),
        (
            "y",
            (problem.y_pitch or line) if writes_vectors else 16,
            min(16, config.vector * out_size),
            problem.out_align if writes_vectors else 16,
        ),
    ):
        if line % config.vector or pitch * (size if name == "x" else out_size) % step or align % step:
            return f"lines of {line} elements of {name}, {pitch} apart, expected multiples of {config.vector} aligned to {step} bytes"
    return None


def derive(problem: Problem, config: Config, num_sms: int = 132) -> Launch:
    """Return the Launch of `config` for `problem`.

    Raises:
        InputError: `why_not` has a reason.
    """
    check_config(problem, config, why_not(problem, config))
    if config.kernel == "columns":
        blocks = -(-problem.inner // (config.vector * config.threads))
        smem = BLOCK_THREADS * config.vector * 4
        return Launch(min(problem.rows * blocks, 2**31 - 1), BLOCK_THREADS, smem, 0, blocks)
    threads = max(config.threads, 128)  # small rows share a block
    kept = -(-problem.length // (config.threads * config.vector))
    rows_a_block = threads // config.threads
    grid = min(-(-problem.rows // rows_a_block), num_sms * 64)
    return Launch(max(1, grid), threads, 0, kept if kept <= MOST_KEPT else 0, 0)


def candidates(problem: Problem, num_sms: int = 132) -> Sequence[Config]:
    """Return the legal configs worth timing, the believed best first."""
    if problem.inner > 1:
        pitch = problem.x_pitch or problem.inner
        out_pitch = problem.y_pitch or problem.inner
        vector = _widest(problem, problem.inner, pitch, out_pitch)
        groups = -(-problem.inner // vector)
        wanted = [t for t in (32, 16, 8, 64, 4, 128) if t <= max(4, groups)]
        return [c for c in (Config("columns", vector, t) for t in wanted) if why_not(problem, c) is None][:4]
    pitch = problem.x_pitch or problem.length
    vector = _widest(problem, problem.length, pitch, (problem.y_pitch or problem.length) if problem.is_normalisation else 8)
    found = [Config("rows", vector, t) for t in ROW_THREADS]
    found.sort(key=lambda c: (derive(problem, c, num_sms).kept == 0, abs(derive(problem, c, num_sms).kept - 2), c.threads))
    return found[:3]


def _widest(problem: Problem, line: int, pitch: int, out_pitch: int) -> int:
    writes_vectors = problem.is_normalisation or problem.inner > 1
    align = min(problem.align, problem.out_align) if writes_vectors else problem.align
    most = vector_elems(line, align, problem.dtype, *((problem.out_dtype,) if writes_vectors else ()))
    return next(v for v in (8, 4, 2, 1) if v <= most and why_not(problem, Config(_kernel(problem), v, 32)) is None)


def _kernel(problem: Problem) -> str:
    return "columns" if problem.inner > 1 else "rows"


def default(problem: Problem, num_sms: int = 132) -> Config:
    """Return the config believed fastest, without timing anything."""
    return candidates(problem, num_sms)[0]


def footprints(problem: Problem) -> dict[str, Footprint]:
    """Return what a launch touches: `x`, `d`, and `scale`, `bias` where they are used."""
    lines, line = (problem.rows * problem.length, problem.inner) if problem.inner > 1 else (problem.rows, problem.length)
    out = problem.out_length
    found = {
        "x": Footprint(problem.dtype, (lines - 1) * (problem.x_pitch or line) + line, problem.align),
        "d": Footprint(problem.out_dtype, (problem.rows - 1) * (problem.y_pitch or out) + out, problem.out_align, writes=True),
    }
    for name, used in (("scale", problem.scale), ("bias", problem.bias)):
        if used:
            found[name] = Footprint("fp32", problem.length)
    return found
