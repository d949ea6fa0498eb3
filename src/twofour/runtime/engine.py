"""An engine: a loaded plan that is called like a function."""

import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from twofour.errors import InputError
from twofour.plan import Plan, ValueSpec
from twofour.runtime.host import host_array

Array = npt.NDArray[Any]


class Backend(Protocol):
    """What a backend offers: one call, inputs and outputs as NumPy arrays in the plan's order."""

    def run(self, inputs: list[Array]) -> list[Array]:
        """Return the outputs."""
        ...

    def profile(self, inputs: list[Array], num_runs: int) -> list[tuple[str, str, float]]:
        """Return (node, operation, microseconds a run), slowest first."""
        ...


def make_backend(plan: Plan, num_threads: int | None, device: int, rebuild: bool) -> Backend:
    """Return the backend that the plan names."""
    if plan.backend == "cuda":
        from twofour.runtime.backends.cuda import CudaBackend

        return CudaBackend(plan, device, rebuild=rebuild)
    from twofour.runtime.backends.onnxruntime import OnnxRuntimeBackend

    return OnnxRuntimeBackend(plan, num_threads)


class Engine:
    """A plan ready to run. Calling it is thread-safe; the output comes in the input's kind (torch tensor, NumPy array, else DLPack)."""

    def __init__(self, plan: Plan, *, num_threads: int | None = None, device: int = 0, rebuild: bool = False) -> None:
        self.plan = plan
        self._backend = make_backend(plan, num_threads, device, rebuild)

    def __str__(self) -> str:
        return f"Engine({self.plan})"

    def __call__(self, *inputs: Any, stream: Any = None) -> Any:
        """Return the output of one batch, or a tuple where the plan has several outputs.

        Args:
            inputs: one value an input of the plan: NumPy array, torch tensor, or anything with DLPack. A GPU plan takes GPU memory as it
                is, and any number of items, padded to the next batch of the plan or in several, unless `plan.whole` says why not.
            stream: of a GPU plan: what the work is put on, an address or a stream object; None: torch's current stream for torch tensors.

        Raises:
            InputError: wrong number, dtype or shape; a stream for a plan that runs on the CPU.
        """
        if self.plan.backend == "cuda":
            return self._backend.call(inputs, stream)  # type: ignore[attr-defined]
        if stream is not None:
            raise InputError("engine: a stream was given, expected none: this plan runs on the CPU")
        arrays = self._checked(inputs)
        outputs = self._backend.run(arrays)
        if inputs and type(inputs[0]).__module__.split(".")[0] == "torch":
            import torch

            tensors = tuple(torch.from_numpy(output).to(inputs[0].device) for output in outputs)
            return tensors[0] if len(tensors) == 1 else tensors
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def profile(self, *inputs: Any, num_runs: int = 20) -> list[tuple[str, str, float]]:
        """Return (node, operation, microseconds a run) over `num_runs` runs, slowest first."""
        return self._backend.profile(self._checked(inputs), num_runs)

    def passes(self, batch: int, sets: int = 2) -> Any:
        """Return what puts whole passes of a GPU plan's batch size on a stream when called with it; for timing.

        Raises:
            InputError: the plan runs on the CPU, or has no such batch size.
        """
        if self.plan.backend != "cuda":
            raise InputError("engine: passes on a stream were asked for, expected a GPU plan: this one runs on the CPU")
        return self._backend.passes(batch, sets)  # type: ignore[attr-defined]

    def random_inputs(self, batch: int, seed: int = 0) -> tuple[Array, ...]:
        """Return standard-normal inputs of the plan's shapes (integers 0 or 1 for integer inputs).

        Raises:
            InputError: the plan's batch is fixed and another.
        """
        fixed = self.plan.fixed_batches
        if fixed and batch not in fixed:
            raise InputError(f"engine: batch {batch} was asked for, the plan takes batches of {fixed[0]} only")
        rng = np.random.default_rng(seed)
        values: list[Array] = []
        for spec in self.plan.inputs:
            shape = tuple(batch if size is None else size for size in spec.shape)
            if np.issubdtype(np.dtype(spec.dtype), np.floating):
                values.append(rng.standard_normal(shape).astype(spec.dtype))
            else:
                values.append(rng.integers(0, 2, shape).astype(spec.dtype))
        return tuple(values)

    def _checked(self, inputs: tuple[Any, ...]) -> list[Array]:
        specs = self.plan.inputs
        if len(inputs) != len(specs):
            number = f"{len(inputs)} input{'s' if len(inputs) != 1 else ''}"
            raise InputError(f"engine: {number} given, expected {len(specs)}: {', '.join(map(str, specs))}")
        arrays = [_as_array(value, spec) for value, spec in zip(inputs, specs, strict=True)]
        batches: set[int] = set()
        for array, spec in zip(arrays, specs, strict=True):
            fits = array.ndim == len(spec.shape) and all(want in (None, got) for want, got in zip(spec.shape, array.shape, strict=True))
            if array.dtype != np.dtype(spec.dtype) or not fits:
                raise InputError(f"engine: input {spec.name!r} is {array.dtype}{list(array.shape)}, expected {spec}")
            batches |= {got for want, got in zip(spec.shape, array.shape, strict=True) if want is None}
        if len(batches) > 1:
            raise InputError(f"engine: the inputs disagree about the batch: {sorted(batches)}; give all the same")
        if 0 in batches:
            raise InputError("engine: the batch is empty, expected at least one item")
        return arrays


def _as_array(value: Any, spec: ValueSpec) -> Array:
    if isinstance(value, np.ndarray):
        return np.ascontiguousarray(value)
    if type(value).__module__.split(".")[0] == "torch":
        return np.ascontiguousarray(host_array(value, spec))
    if hasattr(value, "__dlpack__"):
        return np.ascontiguousarray(np.from_dlpack(value))
    raise InputError(f"engine: input {spec.name!r} is a {type(value).__name__}, expected a NumPy array, a torch tensor or a DLPack object")


def load(path: str | os.PathLike[str] | Plan, *, num_threads: int | None = None, device: int = 0, rebuild: bool = False) -> Engine:
    """Return the engine of a plan file (or of a Plan).

    Args:
        num_threads: CPU threads of the onnxruntime backend; None leaves the choice to it.
        device: number of the GPU for a GPU plan.
        rebuild: ignore the native code inside a GPU plan: compile our kernels from the installed sources and ask the libraries for theirs.

    Raises:
        PlanFormatError: the file is no plan. MissingExtraError: its backend is not installed.
    """
    plan = path if isinstance(path, Plan) else Plan.load(Path(path))
    return Engine(plan, num_threads=num_threads, device=device, rebuild=rebuild)
