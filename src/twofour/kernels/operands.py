"""What every family says about its operands: element types and the memory a launch touches."""

from dataclasses import dataclass

from twofour.errors import InputError, nearest

DTYPE_BYTES = {"fp16": 2, "bf16": 2, "fp32": 4, "int64": 8, "int32": 4, "int8": 1, "uint8": 1, "bool": 1}
FLOAT16 = ("fp16", "bf16")
MAX_DIM = 2**31 - 1
MAX_ELEMS = 2**40  # no operand is larger


@dataclass(frozen=True)
class Footprint:
    """What a launch touches of one operand: `elements` of `dtype` from its address on, which is a multiple of `align` bytes.

    Attributes:
        elements: the distance in elements from the first to behind the last one touched.
        writes: whether the launch writes it.
    """

    dtype: str
    elements: int
    align: int = 16
    writes: bool = False

    @property
    def num_bytes(self) -> int:
        """Bytes from the address on."""
        return self.elements * DTYPE_BYTES[self.dtype]


def check_dtype(name: str, dtype: str, known: tuple[str, ...]) -> None:
    """Do nothing if `dtype` is one of `known`.

    Raises:
        InputError: it is not.
    """
    if dtype not in known:
        raise InputError(f"{name} {dtype!r} is not one of {', '.join(known)}{nearest(str(dtype), known)}")


def check_sizes(least: int, **sizes: int) -> None:
    """Do nothing if every size lies in `least` .. 2^31 - 1.

    Raises:
        InputError: one does not.
    """
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= MAX_DIM:
            raise InputError(f"{name} is {value!r}, expected a whole number from {least} to {MAX_DIM}")


def check_pitch(name: str, pitch: int | None, least: int) -> int:
    """Return the elements between two neighbours: `pitch`, or `least` where it is None.

    Raises:
        InputError: neighbours would overlap.
    """
    if pitch is None:
        return least
    if isinstance(pitch, bool) or not isinstance(pitch, int) or not least <= pitch <= MAX_DIM:
        raise InputError(f"{name} is {pitch!r}, expected at least the {least} elements of one item, or None where they follow each other")
    return pitch


def check_align(**aligns: int) -> None:
    """Do nothing if every alignment is a power of two from 1 to 256 bytes.

    Raises:
        InputError: one is not.
    """
    for name, value in aligns.items():
        if value not in (1, 2, 4, 8, 16, 32, 64, 128, 256):
            raise InputError(f"{name} is {value!r}, expected a power of two from 1 to 256 bytes")


def check_config(problem: object, config: object, reason: str | None) -> None:
    """Do nothing if `reason` is None, what a family's `why_not` says of a config that can compute the problem.

    Raises:
        InputError: there is a reason.
    """
    if reason is not None:
        raise InputError(f"{config} cannot compute {problem}: {reason}")


def vector_elems(count: int, align_bytes: int, *dtypes: str) -> int:
    """Return how many neighbouring elements one thread may move: the most of 8, 4, 2, 1 that divides `count` and keeps addresses aligned.

    `align_bytes` is what every address is known to be a multiple of; a move of more than 16 bytes is made of several of 16.
    """
    for vector in (8, 4, 2):
        if count % vector == 0 and all(align_bytes % min(16, vector * DTYPE_BYTES[dtype]) == 0 for dtype in dtypes):
            return vector
    return 1
