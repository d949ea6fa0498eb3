"""The text NVRTC gets for a Problem and Config: an include and one explicit instantiation. The program is its integers."""

import struct
from pathlib import Path

from twofour.jit.source import Source
from twofour.kernels.pointwise.contract import ARITY, THREADS, Config, Instruction, Launch, Problem
from twofour.kernels.shared import TYPE_NUMBER, flag, kernel_digest, kernel_text, type_name

FOLDER = Path(__file__).parent
_OPERATION = {name: number for number, name in enumerate(ARITY)}


def float_bits(value: float) -> int:
    """Return the bits of `value` rounded to fp32, as a signed integer; beyond its range: an infinity."""
    try:
        return int(struct.unpack("<i", struct.pack("<f", value))[0])
    except OverflowError:
        return float_bits(float("inf") if value > 0 else float("-inf"))


def encode(program: tuple[Instruction, ...]) -> list[int]:
    """Return seven integers an instruction: the operation, then kind and value of three operands (0 input, 1 value, 2 constant, 3 type)."""
    numbers = []
    for op, *operands in program:
        numbers.append(_OPERATION[op])
        for kind, value in operands:
            if kind == "c":
                numbers += [2, float_bits(float(value))]
            elif kind == "d":
                numbers += [3, TYPE_NUMBER[value]]
            else:
                numbers += [0 if kind == "in" else 1, value]
        numbers += [2, 0] * (3 - len(operands))
    return numbers


def _literal(number: int) -> str:
    return "(-2147483647 - 1)" if number == -(2**31) else str(number)


def source(problem: Problem, config: Config, launch: Launch) -> Source:
    """Return the kernel text; equal for problems that differ only in sizes and strides."""
    rank = len(launch.shape)
    types = ", ".join(type_name(d) for d in (*(o.dtype for o in problem.inputs), problem.out_dtype))
    program = f"Program<{', '.join(map(_literal, encode(problem.program)))}>"
    signature = f"Signature<{rank}, {launch.spread}u, {launch.turned}u, {types}>"
    raw, wide = flag(problem.is_raw_copy), flag(launch.wide)
    if config.kernel == "tiled":
        call = f"pointwise_tiled<{program}, {signature}, {raw}, {launch.turn_axis}, {wide}>"
    else:
        call = f"pointwise<{program}, {signature}, {raw}, {config.vector}, {config.repeat}, {wide}>"
    return kernel_text(FOLDER, call, THREADS)


def sources_digest() -> str:
    """Return the digest of the family's device sources, comments stripped."""
    return kernel_digest(FOLDER)
