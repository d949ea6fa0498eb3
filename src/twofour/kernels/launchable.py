"""Any step made callable with its operands by name: what the planner times and the runtime launches."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any, Protocol

from twofour.errors import InputError, UnsupportedError
from twofour.kernels.families import FAMILIES, OURS, WORKSPACE_CAP, why_not
from twofour.kernels.gemm.contract import FLAG_BYTES


class Launchable(Protocol):
    """A prepared step.

    `workspace_bytes` of scratch start at an address whose first `FLAG_BYTES` only our products use; they are zero before the first
    launch and each launch leaves them zero, so steps of all kinds share one workspace, one after the other.
    """

    @property
    def workspace_bytes(self) -> int:
        """Bytes of scratch a launch needs."""
        ...

    def __call__(self, operands: Mapping[str, int], workspace: int, stream: int) -> None:
        """Launch on the device addresses of the operands."""
        ...


# NOTE: our kernels wait for the grid before them on their own (griddepcontrol.wait) and so may be launched while it drains; in a chain of
# short steps that hides a part of each launch. A library's kernels start when what came before has ended.
_OVERLAP = True


class _Plain:
    """A step of a plain family."""

    workspace_bytes = 0

    def __init__(self, family: str, problem: Any, config: Any, device: int, cubin: bytes | None) -> None:
        self._step = _part_of(family, "launch")(problem, config, device=device, overlap=_OVERLAP, cubin=cubin)

    def __call__(self, operands: Mapping[str, int], workspace: int, stream: int) -> None:
        self._step.on(operands, stream)


class _Product:
    """Our matrix product."""

    def __init__(self, problem: Any, config: Any, device: int, cubin: bytes | None) -> None:
        from twofour.kernels.gemm.launch import Gemm

        self._call = Gemm(problem, config, device=device, overlap=_OVERLAP, cubin=cubin)
        self.workspace_bytes: int = self._call.workspace_bytes

    def __call__(self, operands: Mapping[str, int], workspace: int, stream: int) -> None:
        self._call(**operands, workspace=workspace, stream=stream)


class _Library:
    """A library's call; its scratch starts behind the flags."""

    def __init__(self, call: Any) -> None:
        self.call = call

    @property
    def workspace_bytes(self) -> int:
        """Bytes of scratch, flags included."""
        needed = int(self.call.workspace_bytes)
        return needed + FLAG_BYTES if needed else 0

    def __call__(self, operands: Mapping[str, int], workspace: int, stream: int) -> None:
        self.call(**operands, workspace=workspace + FLAG_BYTES if workspace else 0, stream=stream)


def launchable(
    family: str,
    library: str,
    problem: Any,
    config: Any = None,
    algorithm: int | None = None,
    *,
    device: int = 0,
    cubin: bytes | None = None,
    graph: bytes | None = None,
    handle: Any = None,
) -> Launchable:
    """Return the step made callable on GPU `device`.

    Args:
        cubin: our kernel, compiled; None: from the cache or the compiler. graph: cuDNN's serialized plan; None: plan `algorithm` is built.
        handle: a `kernels.cudnn.Handle` to launch through; None: a fresh one.

    Raises:
        InputError: `why_not` has a reason. MissingExtraError: a library is missing. UnsupportedError: it cannot run here.
    """
    reason = why_not(family, library, problem, config)
    if reason is not None:
        raise InputError(f"{library} cannot compute {problem}: {reason}")
    made: Launchable
    if library == OURS:
        made = _Product(problem, config, device, cubin) if family == "gemm" else _Plain(family, problem, config, device, cubin)
    elif library == "cublaslt":
        from twofour.kernels.gemm.cublaslt import BatchedCublasLt, CublasLt

        made = _Library((BatchedCublasLt if family == "matmul" else CublasLt)(problem, algorithm or 0))
    elif library == "cusparselt":
        from twofour.kernels.gemm.cusparselt import CusparseLt

        made = _Library(CusparseLt(problem, algorithm))
    elif family == "conv":
        from twofour.kernels.conv.cudnn import CudnnConv

        made = _Library(CudnnConv(problem, algorithm or 0, device=device, handle=handle, graph=graph))
    else:
        from twofour.kernels.attention.cudnn import CudnnAttention

        made = _Library(CudnnAttention(problem, algorithm or 0, device=device, handle=handle, graph=graph))
    if made.workspace_bytes > WORKSPACE_CAP:
        raise UnsupportedError(
            f"{library} asks for {made.workspace_bytes} bytes of workspace for {problem}, allowed are {WORKSPACE_CAP}; use another tactic"
        )
    return made


def _part_of(family: str, module: str) -> Any:
    """Return what a plain family keeps in one of its modules: the class in `launch`, the functions in `source` and `contract`."""
    launcher = FAMILIES[family].launcher
    assert launcher is not None, family
    found = import_module(f"twofour.kernels.{launcher[0]}.{module}")
    return getattr(found, launcher[1]) if module == "launch" else found


def kernel_source(family: str, problem: Any, config: Any, num_sms: int) -> Any:
    """Return the `Source` of one of our kernels, whose cubin a plan may hold."""
    if family == "gemm":
        from twofour.kernels.gemm.source import source as gemm_source

        return gemm_source(problem, config)
    return _part_of(family, "source").source(problem, config, _part_of(family, "contract").derive(problem, config, num_sms))


def sources_digests() -> dict[str, str]:
    """Return the digest of each family's device sources: a plan's cubins serve only the installed package with the same ones."""
    from twofour.kernels.gemm.source import sources_digest as gemm_digest

    plain = {name: _part_of(name, "source").sources_digest() for name, family in FAMILIES.items() if family.launcher is not None}
    return {"gemm": gemm_digest(), **plain}
