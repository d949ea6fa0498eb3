"""All families by name: which libraries compute each, how its records are read from a file, and what a launch touches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from twofour.errors import InputError, nearest
from twofour.kernels.attention import contract as attention
from twofour.kernels.conv import contract as conv
from twofour.kernels.depthwise import contract as depthwise
from twofour.kernels.gemm import contract as gemm
from twofour.kernels.grouped import contract as grouped
from twofour.kernels.matmul import contract as matmul
from twofour.kernels.operands import DTYPE_BYTES, Footprint
from twofour.kernels.patches import contract as patches
from twofour.kernels.pointwise import contract as pointwise
from twofour.kernels.pool import contract as pool
from twofour.kernels.records import from_plain
from twofour.kernels.reduce import contract as reduce
from twofour.pattern.pack_sm90 import block_bytes

OURS = "twofour"
# The most scratch memory a step may ask for; libraries are told this limit.
WORKSPACE_CAP = 1 << 30


@dataclass(frozen=True)
class Family:
    """A kind of step.

    Attributes:
        problem, config: its records; config None: computed by libraries only. libraries: who can compute it.
        footprints: what a launch of a problem by a library touches, by operand name.
        why_not: the legality rule of our kernels. candidates: their configs for a problem and a number of multiprocessors.
        launcher: of a plain family, the module under `kernels` and the class in its `launch` that prepares a step.
        pack: of a plain family with a weight, the weight as its kernels read it; both as the bits of the problem's type. None: as it is.
    """

    problem: type
    config: type | None
    libraries: tuple[str, ...]
    footprints: Callable[[Any, str], dict[str, Footprint]]
    why_not: Callable[[Any, Any], str | None] | None = None
    candidates: Callable[[Any, int], Sequence[Any]] | None = None
    launcher: tuple[str, str] | None = None
    pack: Callable[[Any, npt.NDArray[Any]], npt.NDArray[Any]] | None = None


def _plain(contract: Any, folder: str, launcher: str, problem: type | None = None) -> Family:
    """Return a family that our kernels alone compute."""
    return Family(
        problem or contract.Problem,
        contract.Config,
        (OURS,),
        lambda asked, _library: dict(contract.footprints(asked)),
        contract.why_not,
        contract.candidates,
        (folder, launcher),
        getattr(contract, "pack_weight", None),
    )


def _gemm_footprints(p: gemm.Problem, library: str) -> dict[str, Footprint]:
    e = p.epilogue
    if library == OURS:
        weight = Footprint("uint8", p.row_blocks * p.k_blocks * block_bytes(p.sparse))
    elif library == "cusparselt":
        # The compressed form is opaque; it holds at least the values that are kept.
        weight = Footprint("uint8", p.weight_rows * p.inputs // 2 * DTYPE_BYTES[p.dtype])
    else:
        weight = Footprint(p.dtype, p.weight_rows * p.inputs)
    found = {
        "x": Footprint(p.dtype, p.tokens * p.inputs),
        "weight": weight,
        "d": Footprint(p.out_dtype, p.tokens * p.outputs, writes=True),
    }
    if e.scale:
        found["scale"] = Footprint("fp32", p.weight_rows)
    if e.bias:
        found["bias"] = Footprint(bias_dtype(library, p.out_dtype), p.weight_rows)
    if e.residual:
        found["residual"] = Footprint(p.out_dtype, p.tokens * p.outputs)
    return found


FAMILIES = {
    "gemm": Family(gemm.Problem, gemm.Config, (OURS, "cublaslt", "cusparselt"), _gemm_footprints, gemm.why_not, gemm.candidates),
    "matmul": Family(matmul.Problem, None, ("cublaslt",), lambda p, _: matmul.footprints(p)),
    "conv": Family(conv.Problem, None, ("cudnn",), lambda p, library: conv.footprints(p, bias_dtype(library, p.dtype))),
    "attention": Family(attention.Problem, None, ("cudnn",), lambda p, _: attention.footprints(p)),
    "pointwise": _plain(pointwise, "pointwise", "Pointwise"),
    "pool": _plain(pool, "pool", "Pool"),
    "resize": _plain(pool, "pool", "Pool", pool.ResizeProblem),
    "reduce": _plain(reduce, "reduce", "Reduce"),
    "patches": _plain(patches, "patches", "Patches"),
    "grouped": _plain(grouped, "grouped", "Grouped"),
    "depthwise": _plain(depthwise, "depthwise", "Depthwise"),
}
# Family -> the others in whose terms a problem of it may be computed, each with what restates the problem, None where it cannot.
RESTATEMENTS: dict[str, dict[str, Callable[[Any], Any]]] = {
    "conv": {"gemm": conv.as_gemm, "grouped": grouped.as_grouped, "depthwise": depthwise.as_depthwise}
}


def family(name: str) -> Family:
    """Return the family called `name`.

    Raises:
        InputError: there is none.
    """
    found = FAMILIES.get(name)
    if found is None:
        raise InputError(f"family {name!r} is not one of {', '.join(FAMILIES)}{nearest(str(name), FAMILIES)}")
    return found


def restated(name: str, problem: Any) -> dict[str, Any]:
    """Return `problem` of family `name` in the terms of each other family that can state it, by that family's name."""
    found = {other: restate(problem) for other, restate in RESTATEMENTS.get(name, {}).items()}
    return {other: stated for other, stated in found.items() if stated is not None}


def bias_dtype(library: str, dtype: str) -> str:
    """Return the element type in which `library` adds a bias to an output of `dtype`: ours fp32, the others the output's own."""
    return "fp32" if library == OURS else dtype


def read_problem(name: str, data: Any, where: str) -> Any:
    """Return the Problem of family `name` that `to_plain` gave as `data`.

    Raises:
        InputError: the family is unknown or the data are no such Problem.
    """
    return from_plain(family(name).problem, data, where)


def read_config(name: str, data: Any, where: str) -> Any:
    """Return the Config of family `name` that `to_plain` gave as `data`; None for None.

    Raises:
        InputError: the family has no configs or the data are none.
    """
    if data is None:
        return None
    kind = family(name).config
    if kind is None:
        raise InputError(f"{where} is given, expected none: {name} is computed by libraries only")
    return from_plain(kind, data, where)


def why_not(name: str, library: str, problem: Any, config: Any) -> str | None:
    """Return why `library` with `config` cannot compute `problem` of family `name`, or None when it can."""
    found = family(name)
    if library not in found.libraries:
        return f"library {library!r} is not one of {', '.join(found.libraries)}"
    if library == OURS:
        if config is None or found.why_not is None:
            return f"our kernels need a config for {name}, got none"
        return found.why_not(problem, config)
    if config is not None:
        return f"{library} takes no config of ours"
    if name in ("gemm", "matmul"):
        from twofour.kernels.gemm import cublaslt, cusparselt

        return cusparselt.why_not(problem) if library == "cusparselt" else cublaslt.why_not(problem)
    if name == "conv":
        from twofour.kernels.conv import cudnn as cudnn_conv

        return cudnn_conv.why_not(problem)
    from twofour.kernels.attention import cudnn as cudnn_attention

    return cudnn_attention.why_not(problem)


def footprints(name: str, library: str, problem: Any) -> dict[str, Footprint]:
    """Return what a launch of `problem` of family `name` by `library` touches, by operand name."""
    return family(name).footprints(problem, library)
