"""Numbers as people read them: a value and its unit, chosen once here for the page, the charts and the terminal."""

import math

NOT_KNOWN = "–"
BYTE_STEPS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
FLOP_STEPS = ((1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"), (1e3, "kFLOP"))


def significant(value: float, digits: int = 3) -> str:
    """Return `value` with at least `digits` significant digits, all its integer digits, and commas between thousands."""
    if not math.isfinite(value):
        return NOT_KNOWN
    if value == 0:
        return "0"
    rounded = float(f"{value:.{digits}g}")
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(rounded))))
    return f"{value:,.{decimals}f}"


def fixed(value: float, decimals: int) -> str:
    """Return `value` with `decimals` digits after the point, commas between thousands and a true minus sign."""
    return f"{value:,.{decimals}f}".replace("-", "−") if math.isfinite(value) else NOT_KNOWN


def signed(value: float, decimals: int) -> str:
    """Return `value` as `fixed` does, with its sign; a value that rounds to zero is ±0."""
    if not math.isfinite(value):
        return NOT_KNOWN
    text = fixed(abs(value), decimals)
    if float(text.replace(",", "")) == 0:
        return f"±{text}"
    return f"{'+' if value > 0 else '−'}{text}"


def step_of(value: float, steps: tuple[tuple[float, str], ...], base: str) -> tuple[float, str]:
    """Return the largest `(scale, unit)` of `steps` not above `value`, else `(1, base)`."""
    return next(((scale, unit) for scale, unit in steps if value >= scale), (1.0, base))


def bytes_text(value: float) -> str:
    """Return a size in B, kB (1,000 B), MB or GB."""
    scale, unit = step_of(value, BYTE_STEPS, "B")
    return f"{significant(value / scale)} {unit}"


def flops_text(value: float) -> str:
    """Return a count of floating-point operations, two a multiply-add."""
    scale, unit = step_of(value, FLOP_STEPS, "FLOP")
    return f"{significant(value / scale)} {unit}"


def share_text(value: float, decimals: int = 1) -> str:
    """Return a share in 0…1 as percent."""
    return f"{fixed(100 * value, decimals)} %"


def milliseconds_text(value: float) -> str:
    """Return a time given in milliseconds."""
    return f"{significant(value)} ms"
