"""What the sources of the plain families share: device code, and the text around a family's call."""

from collections.abc import Sequence
from pathlib import Path

from twofour.jit.source import Source, digest, flatten

FOLDER = Path(__file__).parent
INCLUDE = FOLDER.parent / "include"
TYPE = {"fp16": "kFp16", "bf16": "kBf16", "fp32": "kFp32", "int64": "kInt64", "int32": "kInt32", "int8": "kInt8", "uint8": "kUint8"}
TYPE |= {"bool": "kBool"}
TYPE_NUMBER = {name: number for number, name in enumerate(TYPE)}


def flag(value: bool) -> str:
    """Return the C++ literal."""
    return "true" if value else "false"


def type_name(dtype: str) -> str:
    """Return the C++ name of an element type."""
    return f"Type::{TYPE[dtype]}"


def kernel_text(folder: Path, call: str, bounds: int | str, others: Sequence[Path] = ()) -> Source:
    """Return a family's kernel: `call` on its parameters, as C++.

    Args:
        folder: of the family `name`: its header is `name.cuh`, the struct of its parameters `NameParams`. bounds: `__launch_bounds__`.
        others: folders of families whose headers it includes.
    """
    name = folder.name
    stub = (
        f'#include "{name}.cuh"\n'
        f'extern "C" __global__ void __launch_bounds__({bounds}) {name}(const __grid_constant__ twofour::{name.title()}Params params) {{\n'
        f"    using namespace twofour;\n    {call}(params);\n}}\n"
    )
    return Source(name, flatten(stub, [folder, *others, FOLDER, INCLUDE]))


def kernel_digest(folder: Path, others: Sequence[Path] = ()) -> str:
    """Return the digest of a family's device sources, comments stripped; `others` as in `kernel_text`."""
    return digest([*(path for each in (folder, *others) for path in each.glob("*.cuh")), *FOLDER.glob("*.cuh"), INCLUDE / "ptx_sm90.cuh"])
