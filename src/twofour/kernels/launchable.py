"""Any step made callable with its operands by name: what the planner times and the runtime launches."""

from collections.abc import Mapping
from typing import Any, Protocol

from twofour.errors import InputError, UnsupportedError
from twofour.kernels.families import OURS, WORKSPACE_CAP, why_not
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


class _Ours:
    """One of our kernels."""

    def __init__(self, family: str, problem: Any, config: Any, device: int, cubin: bytes | None) -> None:
        self.workspace_bytes: int = 0
        self._family = family
        self._call: Any
        if family == "gemm":
            from twofour.kernels.gemm.launch import Gemm

            self._call = Gemm(problem, config, device=device, cubin=cubin)
            self.workspace_bytes = self._call.workspace_bytes
        elif family == "pointwise":
            from twofour.kernels.pointwise.launch import Pointwise

            self._call = Pointwise(problem, config, device=device, cubin=cubin)
            self._names = [f"in{i}" for i in range(len(problem.inputs))]
        elif family in ("pool", "resize"):
            from twofour.kernels.pool.launch import Pool

            self._call = Pool(problem, config, device=device, cubin=cubin)
        else:
            from twofour.kernels.reduce.launch import Reduce

            self._call = Reduce(problem, config, device=device, cubin=cubin)

    def __call__(self, operands: Mapping[str, int], workspace: int, stream: int) -> None:
        if self._family == "gemm":
            self._call(**operands, workspace=workspace, stream=stream)
        elif self._family == "pointwise":
            self._call([operands[name] for name in self._names], operands["d"], stream=stream)
        else:
            self._call(**operands, stream=stream)


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
        made = _Ours(family, problem, config, device, cubin)
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


def kernel_source(family: str, problem: Any, config: Any, num_sms: int) -> Any:
    """Return the `Source` of one of our kernels, whose cubin a plan may hold."""
    if family == "gemm":
        from twofour.kernels.gemm.source import source as gemm_source

        return gemm_source(problem, config)
    if family == "pointwise":
        from twofour.kernels.pointwise import contract as pointwise
        from twofour.kernels.pointwise.source import source as pointwise_source

        return pointwise_source(problem, config, pointwise.derive(problem, config, num_sms))
    if family in ("pool", "resize"):
        from twofour.kernels.pool import contract as pool
        from twofour.kernels.pool.source import source as pool_source

        return pool_source(problem, config, pool.derive(problem, config, num_sms))
    from twofour.kernels.reduce import contract as reduce
    from twofour.kernels.reduce.source import source as reduce_source

    return reduce_source(problem, config, reduce.derive(problem, config, num_sms))


def sources_digests() -> dict[str, str]:
    """Return the digest of each family's device sources: a plan's cubins serve only the installed package with the same ones."""
    from twofour.kernels.gemm.source import sources_digest as gemm_digest
    from twofour.kernels.pointwise.source import sources_digest as pointwise_digest
    from twofour.kernels.pool.source import sources_digest as pool_digest
    from twofour.kernels.reduce.source import sources_digest as reduce_digest

    return {
        "gemm": gemm_digest(),
        "pointwise": pointwise_digest(),
        "pool": pool_digest(),
        "resize": pool_digest(),
        "reduce": reduce_digest(),
    }
