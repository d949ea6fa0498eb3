"""Device code that the plain families share."""

from pathlib import Path

FOLDER = Path(__file__).parent
TYPE = {"fp16": "kFp16", "bf16": "kBf16", "fp32": "kFp32", "int64": "kInt64", "int32": "kInt32", "int8": "kInt8", "uint8": "kUint8"}
TYPE |= {"bool": "kBool"}
TYPE_NUMBER = {name: number for number, name in enumerate(TYPE)}


def flag(value: bool) -> str:
    """Return the C++ literal."""
    return "true" if value else "false"


def type_name(dtype: str) -> str:
    """Return the C++ name of an element type."""
    return f"Type::{TYPE[dtype]}"
