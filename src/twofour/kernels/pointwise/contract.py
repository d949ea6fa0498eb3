"""The contract of the pointwise family: any chain of element-wise operations over broadcast operands, and strided copies.

    out[i] = program(in_0[i], in_1[i], ...),  fp32 arithmetic, each operand with its own strides

Everything here is a pure function of plain values: no tensor, no compiler, no GPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

from twofour.errors import InputError, nearest
from twofour.kernels.operands import DTYPE_BYTES, MAX_ELEMS, Footprint, check_align, check_config, check_dtype, check_sizes

DTYPES = tuple(DTYPE_BYTES)
MAX_INPUTS = 6
MAX_STEPS = 48
MAX_AXES = 8  # after `collapse`
THREADS = 256
TILE = 32  # side of the square that the kernel "tiled" turns in shared memory

# Operation -> number of operands. The kernel numbers them in this order.
ARITY = {
    "add": 2, "sub": 2, "mul": 2, "div": 2, "min": 2, "max": 2, "pow": 2, "neg": 1, "abs": 1, "sqrt": 1, "rsqrt": 1, "exp": 1, "log": 1,
    "erf": 1, "tanh": 1, "sigmoid": 1, "relu": 1, "leakyrelu": 2, "prelu": 2, "elu": 2, "gelu": 1, "gelu_tanh": 1, "silu": 1,
    "hardswish": 1, "hardsigmoid": 3, "clip": 3, "where": 3, "equal": 2, "less": 2, "greater": 2, "not": 1, "and": 2, "or": 2, "cast": 2,
    "floor": 1, "ceil": 1, "softplus": 1,
}  # fmt: skip

Instruction = tuple[Any, ...]  # ("add", ("in", 0), ("c", 1.0))


@dataclass(frozen=True)
class Operand:
    """An input: its element type, its stride in elements along every axis of `Problem.shape` (0: broadcast), its address' alignment."""

    dtype: str
    strides: tuple[int, ...]
    align: int = 16


@dataclass(frozen=True)
class Problem:
    """One element-wise computation as asked.

    Attributes:
        shape: of the output, row-major axes, each >= 1.
        inputs: 1 to `MAX_INPUTS` operands.
        out_dtype: of the output; integers and bool are reached by truncation and `!= 0`.
        out_strides: of the output in elements, one an axis, all places distinct.
        program: instructions `(operation, operand, ...)` in single-assignment form, the last one's value is stored. An operand is
            `("in", i)`, `("t", j)` (the value of instruction j), `("c", number)`; the second of `cast` is `("d", dtype)`, which rounds
            the value as that type would hold it. `leakyrelu`, `elu`: (x, alpha). `prelu`: (x, slope). `hardsigmoid`: (x, alpha, beta).
            `clip`: (x, low, high). `where`: (condition, then, else). Comparisons give 1 or 0. Empty: a copy of input 0, to the bit where
            both types are equal, so that int64 survives; elsewhere integers pass through fp32 and are exact up to 2^24.
        out_align: bytes the output's address is a multiple of.
    """

    shape: tuple[int, ...]
    inputs: tuple[Operand, ...]
    out_dtype: str
    out_strides: tuple[int, ...]
    program: tuple[Instruction, ...] = ()
    out_align: int = 16

    def __post_init__(self) -> None:
        for axis, size in enumerate(self.shape):
            check_sizes(1, **{f"axis {axis}": size})
        if not 1 <= len(self.inputs) <= MAX_INPUTS:
            raise InputError(f"a pointwise step has {len(self.inputs)} inputs, expected 1 to {MAX_INPUTS}; split it in two")
        check_dtype("out_dtype", self.out_dtype, DTYPES)
        check_align(out_align=self.out_align)
        for number, operand in enumerate(self.inputs):
            check_dtype(f"dtype of input {number}", operand.dtype, DTYPES)
            check_align(align=operand.align)
        for name, strides in (*((f"input {i}", o.strides) for i, o in enumerate(self.inputs)), ("output", self.out_strides)):
            if len(strides) != len(self.shape) or any(
                isinstance(s, bool) or not isinstance(s, int) or not 0 <= s <= MAX_ELEMS for s in strides
            ):
                raise InputError(f"strides {list(strides)} of the {name}: expected {len(self.shape)} whole numbers from 0 to {MAX_ELEMS}")
            if span(self.shape, strides) > MAX_ELEMS:
                raise InputError(f"the {name} spans {span(self.shape, strides)} elements, expected at most {MAX_ELEMS}")
        _check_distinct(self.shape, self.out_strides)
        _check_program(self.program, len(self.inputs))
        if len(collapse(self).shape) > MAX_AXES:
            raise InputError(f"shape {list(self.shape)} has more than {MAX_AXES} axes that cannot be merged; copy it in two steps")

    @property
    def num_elems(self) -> int:
        """Elements of the output."""
        return prod(self.shape)

    @property
    def flops(self) -> int:
        """One an instruction and element."""
        return self.num_elems * len(self.program)

    @property
    def num_bytes(self) -> int:
        """Bytes read and written, each distinct element once."""
        sizes = zip(self.inputs, (prod(n for n, s in zip(self.shape, o.strides, strict=True) if s) for o in self.inputs), strict=True)
        return sum(DTYPE_BYTES[o.dtype] * n for o, n in sizes) + DTYPE_BYTES[self.out_dtype] * self.num_elems

    @property
    def is_raw_copy(self) -> bool:
        """Whether bits are moved unchanged."""
        return not self.program and self.inputs[0].dtype == self.out_dtype


def span(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Return the elements from the first to behind the last one of a strided array."""
    return 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))


def _check_distinct(shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    reach = 1
    for stride, size in sorted((s, n) for n, s in zip(shape, strides, strict=True) if n > 1):
        if stride < reach:
            raise InputError(f"output strides {list(strides)} of shape {list(shape)} write a place twice; give each element its own")
        reach = stride * (size - 1) + reach


def _check_program(program: tuple[Instruction, ...], num_inputs: int) -> None:
    if len(program) > MAX_STEPS:
        raise InputError(f"the program has {len(program)} instructions, expected at most {MAX_STEPS}; split the step in two")
    for number, instruction in enumerate(program):
        if not isinstance(instruction, tuple) or not instruction or not isinstance(instruction[0], str):
            raise InputError(f"instruction {number} is {instruction!r}, expected (operation, operand, ...)")
        op, *operands = instruction
        if op not in ARITY:
            raise InputError(
                f"instruction {number}: operation {op!r} is unknown{nearest(op, ARITY)}; the known ones are {', '.join(ARITY)}"
            )
        if len(operands) != ARITY[op]:
            raise InputError(f"instruction {number}: {op} has {len(operands)} operands, expected {ARITY[op]}")
        for place, operand in enumerate(operands):
            if not isinstance(operand, tuple) or len(operand) != 2 or not _is_operand(operand, op, place, number, num_inputs):
                raise InputError(
                    f"instruction {number}: operand {place} of {op} is {operand!r}, expected ('in', i below {num_inputs}), "
                    f"('t', j below {number}) or ('c', number)" + (", and ('d', dtype) as the second" if op == "cast" else "")
                )


def _is_operand(operand: tuple[Any, Any], op: str, place: int, number: int, num_inputs: int) -> bool:
    kind, value = operand
    if op == "cast" and place == 1:
        return kind == "d" and isinstance(value, str) and value in DTYPES
    if isinstance(value, bool):
        return False
    if kind == "in":
        return isinstance(value, int) and 0 <= value < num_inputs
    if kind == "t":
        return isinstance(value, int) and 0 <= value < number
    return kind == "c" and (isinstance(value, float) or (isinstance(value, int) and abs(value) <= 2**24))


@dataclass(frozen=True)
class Collapsed:
    """The same iteration with as few axes as possible, the output's strides falling; `strides` has a row an input, the output's last."""

    shape: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]


def collapse(problem: Problem) -> Collapsed:
    """Return the problem's axes sorted by the output's stride, without axes of size 1, neighbours merged where every operand allows it.

    Axes a (outer) and b (inner) merge where stride_a = stride_b x size_b for every operand, broadcast ones (0 = 0) included.
    """
    rows = [o.strides for o in problem.inputs] + [problem.out_strides]
    axes = [a for a in range(len(problem.shape)) if problem.shape[a] > 1]
    axes.sort(key=lambda a: -problem.out_strides[a])
    shape: list[int] = []
    strides: list[list[int]] = []  # one list an axis
    for axis in axes:
        size, here = problem.shape[axis], [row[axis] for row in rows]
        if shape and all(outer == inner * size for outer, inner in zip(strides[-1], here, strict=True)):
            shape[-1] *= size
            strides[-1] = here
        else:
            shape.append(size)
            strides.append(here)
    if not shape:
        shape, strides = [1], [[1] * len(rows)]
    return Collapsed(tuple(shape), tuple(tuple(axis[row] for axis in strides) for row in range(len(rows))))


@dataclass(frozen=True, order=True)
class Config:
    """One way to compute a Problem.

    Attributes:
        kernel: "vector" walks the output in order; "tiled" turns squares in shared memory where an input's rows are the output's columns.
        vector: neighbouring elements a thread moves at once: 8, 4, 2 or 1.
        repeat: how many such groups a thread has in flight.
    """

    kernel: str = "vector"
    vector: int = 8
    repeat: int = 1


@dataclass(frozen=True)
class Launch:
    """Integers that follow from Problem and Config.

    Attributes:
        groups: of `vector` elements ("vector"), or squares ("tiled").
        shape: iterations along each collapsed axis, the last one in groups. strides: a row an input, the output's last, in elements
            a step along that axis. spread: bit i: input i has one value for a whole group.
        turned: bit i: input i is turned in shared memory. turn_axis: the axis along which turned inputs are contiguous.
        wide: whether counts or offsets need 64 bits.
    """

    grid: int
    threads: int
    smem_bytes: int
    groups: int
    shape: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    spread: int
    turned: int = 0
    turn_axis: int = 0
    wide: bool = False


def turn_axis(collapsed: Collapsed) -> int | None:
    """Return the axis, not the last, along which some input is contiguous while it jumps along the last; None where there is none."""
    last = len(collapsed.shape) - 1
    for row in collapsed.strides[:-1]:
        for axis in range(last):
            if row[axis] == 1 and row[last] > 1 and min(collapsed.shape[axis], collapsed.shape[last]) >= TILE // 2:
                return axis
    return None


def why_not(problem: Problem, config: Config) -> str | None:
    """Return why `config` cannot compute `problem`, or None when it can."""
    if config.kernel not in ("vector", "tiled"):
        return f"kernel {config.kernel!r} is not one of vector, tiled"
    if config.vector not in (1, 2, 4, 8) or config.repeat not in (1, 2, 4):
        return f"vector {config.vector} and repeat {config.repeat}: expected 1, 2, 4 or 8 and 1, 2 or 4"
    collapsed = collapse(problem)
    if config.kernel == "tiled":
        if turn_axis(collapsed) is None:
            return "no input is contiguous along another axis than the output; use vector"
        if config.vector != 1 or config.repeat != 1:
            return "the tiled kernel moves one element a thread, expected vector 1 and repeat 1"
        return None
    if config.vector == 1:
        return None
    if collapsed.shape[-1] % config.vector:
        return f"the innermost axis has {collapsed.shape[-1]} elements, expected a multiple of {config.vector}"
    named = [(f"input {i}", o.dtype, o.align) for i, o in enumerate(problem.inputs)] + [("output", problem.out_dtype, problem.out_align)]
    for (name, dtype, align), row in zip(named, collapsed.strides, strict=True):
        if row[-1] == 0 and name != "output":
            continue
        if row[-1] != 1:
            return f"the {name} has stride {row[-1]} along the innermost axis, expected 1"
        step = min(16, config.vector * DTYPE_BYTES[dtype])
        if align % step or any(s * DTYPE_BYTES[dtype] % step for s in row[:-1]):
            return f"rows of the {name} are not aligned to {step} bytes"
    return None


def derive(problem: Problem, config: Config, num_sms: int = 132) -> Launch:
    """Return the Launch of `config` for `problem`.

    Raises:
        InputError: `why_not` has a reason.
    """
    check_config(problem, config, why_not(problem, config))
    found = collapse(problem)
    spread = sum(1 << i for i, row in enumerate(found.strides[:-1]) if row[-1] == 0)
    wide = max(span(found.shape, row) for row in found.strides) > 2**31 - 1 or prod(found.shape) > 2**31 - 1
    if config.kernel == "tiled":
        axis = turn_axis(found)
        assert axis is not None
        turned = sum(1 << i for i, row in enumerate(found.strides[:-1]) if row[axis] == 1 and row[-1] > 1)
        shape = tuple(ceil(n / TILE) if a in (axis, len(found.shape) - 1) else n for a, n in enumerate(found.shape))
        groups = prod(shape)
        smem = turned.bit_count() * TILE * (TILE + 1) * 4 if not problem.is_raw_copy else TILE * (TILE + 1) * DTYPE_BYTES[problem.out_dtype]
        return Launch(min(groups, 2**31 - 1), THREADS, smem, groups, shape, found.strides, spread, turned, axis, wide or groups > 2**31 - 1)
    shape = (*found.shape[:-1], found.shape[-1] // config.vector)
    strides = tuple((*row[:-1], row[-1] * config.vector) for row in found.strides)
    groups = prod(shape)
    blocks = ceil(groups / (THREADS * config.repeat))
    return Launch(max(1, min(blocks, num_sms * 64)), THREADS, 0, groups, shape, strides, spread, wide=wide)


def candidates(problem: Problem, num_sms: int = 132) -> Sequence[Config]:
    """Return the legal configs worth timing, the believed best first."""
    collapsed = collapse(problem)
    found = []
    if turn_axis(collapsed) is not None:
        found.append(Config("tiled", 1, 1))
    vector = next(v for v in (8, 4, 2, 1) if why_not(problem, Config(vector=v)) is None)
    many = prod(collapsed.shape) // vector >= num_sms * THREADS * 8
    found += [Config(vector=vector, repeat=r) for r in ((2, 4, 1) if many else (1, 2))]
    return found


def default(problem: Problem, num_sms: int = 132) -> Config:
    """Return the config believed fastest, without timing anything."""
    return candidates(problem, num_sms)[0]


def footprints(problem: Problem) -> dict[str, Footprint]:
    """Return what a launch touches: `in0` .. `in5` and `d`."""
    found = {f"in{i}": Footprint(o.dtype, span(problem.shape, o.strides), o.align) for i, o in enumerate(problem.inputs)}
    found["d"] = Footprint(problem.out_dtype, span(problem.shape, problem.out_strides), problem.out_align, writes=True)
    return found


def copy(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: str,
    out_strides: tuple[int, ...],
    out_dtype: str | None = None,
    align: int = 16,
    out_align: int = 16,
) -> Problem:
    """Return the Problem of a strided copy: transpose, slice, part of a concatenation, layout change, cast."""
    return Problem(shape, (Operand(dtype, strides, align),), out_dtype or dtype, out_strides, (), out_align)
