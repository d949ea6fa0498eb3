"""What the convolution and attention tactics share of cuDNN: the library, a handle, a graph that is built by plan number or read back.

Uses the compiled module of nvidia-cudnn-frontend alone: addresses in, no torch, no engine but the library's own.
"""

import threading
from collections.abc import Callable, Mapping
from typing import Any

from twofour.errors import MissingExtraError, UnsupportedError
from twofour.jit import driver
from twofour.kernels.operands import MAX_DIM

INSTALL = "pip install 'twofour[cudnn]'"


def library() -> Any:
    """Return the frontend's compiled module.

    Raises:
        MissingExtraError: nvidia-cudnn-frontend or cuDNN itself is not installed.
    """
    try:
        import cudnn
    except (ImportError, OSError) as e:
        raise MissingExtraError(f"the cudnn tactic needs nvidia-cudnn-frontend, which could not be imported ({e}); {INSTALL}") from e
    module = getattr(cudnn, "_pybind_module", cudnn)
    try:
        module.backend_version()
    except RuntimeError as e:
        raise MissingExtraError(f"the cudnn tactic needs cuDNN, which could not be loaded ({e}); {INSTALL}") from e
    return module


def version() -> str:
    """Return cuDNN's version, like `9.19.0`."""
    number = int(library().backend_version())
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"


class Handle:
    """A cuDNN handle of one GPU. Launches through it are ordered by its lock; each execution context has its own."""

    def __init__(self, device: int = 0) -> None:
        """Open the library on GPU `device`.

        Raises:
            MissingExtraError: it is not installed. UnsupportedError: it cannot open the GPU.
        """
        self.module, self.device = library(), device
        driver.use_device(device)
        self.lock = threading.Lock()
        self._stream = -1
        try:
            self.raw = int(self.module.create_handle())
        except RuntimeError as e:
            raise UnsupportedError(f"cuDNN {version()} could not open GPU {device} ({_first(e)}); check nvidia-smi") from e
        self._set_stream = getattr(self.module, "_raw_set_stream", None) or self.module.set_stream

    def use_stream(self, stream: int) -> None:
        """Launch on `stream` from now on; the caller holds the lock."""
        if stream != self._stream:
            self._set_stream(self.raw, stream)
            self._stream = stream


def _first(error: Exception) -> str:
    return (str(error).splitlines() or ["no reason given"])[0]


class Graph:
    """A cuDNN graph with one chosen plan; operands are known by the numbers that `describe` gave them.

    `describe(graph, module)` adds tensors and operations. Plans are those of heuristic mode A, then the fallbacks, numbered from 0; the
    list of one library version is the same every time. NOTE: any plan but the first few may be wrong for this GPU; one was seen to end
    the CUDA context with an illegal instruction, so the others are tried in a process of their own.
    """

    def __init__(self, what: object, dtype: str, describe: Callable[[Any, Any], None], handle: Handle, most_workspace: int) -> None:
        """Validate the graph and list its plans; `build` or `read` makes one runnable.

        Raises:
            UnsupportedError: the library has no plan for it.
        """
        module = handle.module
        self._what, self._handle, self._most = what, handle, most_workspace
        kind = getattr(module, "backend_graph", None) or module.pygraph
        types = module.data_type
        io = {"fp16": types.HALF, "bf16": types.BFLOAT16}[dtype]
        self._new: Callable[[], Any] = lambda: kind(
            io_data_type=io, intermediate_data_type=types.FLOAT, compute_data_type=types.FLOAT, handle=handle.raw, name="twofour"
        )
        self._describe = describe
        self._graph: Any = None
        self._index: int | None = None
        self.workspace_bytes = 0

    def _list(self) -> None:
        module = self._handle.module
        modes, reason = module.heur_mode, ""
        # Fused graphs may have no fallback engines, and then asking for them is an error.
        for wanted in ([modes.A, modes.FALLBACK], [modes.A]):
            graph = self._new()
            try:
                self._describe(graph, module)
                graph.validate()
                graph.build_operation_graph()
                graph.create_execution_plans(wanted)
                graph.check_support()
            except (RuntimeError, ValueError, module.cudnnGraphNotSupportedError) as e:
                reason = _first(e)
                continue
            self._graph = graph
            return
        raise UnsupportedError(f"cuDNN {version()} cannot compute {self._what} ({reason}); use another tactic")

    def num_plans(self) -> int:
        """Return how many plans the library lists."""
        if self._graph is None:
            self._list()
        return int(self._graph.get_execution_plan_count())

    def build(self, index: int) -> None:
        """Build plan `index`.

        Raises:
            UnsupportedError: there is none, it does not build, or it needs more workspace than allowed.
        """
        count = self.num_plans()
        if not 0 <= index < count:
            raise UnsupportedError(f"cuDNN {version()} lists {count} plans for {self._what}, expected number {index}; build the plan again")
        module = self._handle.module
        try:
            self._graph.build_plan_at_index(index)
            workspace = int(self._graph.get_workspace_size_plan_at_index(index))
        except (RuntimeError, module.cudnnGraphNotSupportedError) as e:
            raise UnsupportedError(f"cuDNN {version()} could not build plan {index} of {self._what} ({_first(e)}); use another") from e
        self._accept(workspace, f"plan {index}")
        self._index = index

    def _accept(self, workspace: int, which: str) -> None:
        if not 0 <= workspace <= self._most:
            raise UnsupportedError(f"{which} of {self._what} needs {workspace} bytes of workspace, allowed are {self._most}; use another")
        self.workspace_bytes = workspace

    def serialized(self) -> bytes:
        """Return the built plan as bytes; they serve the same library version and kind of GPU."""
        return bytes(self._graph.serialize())

    def read(self, data: bytes) -> None:
        """Take the plan in `data` instead of building one.

        Raises:
            UnsupportedError: the library refuses it.
        """
        module = self._handle.module
        graph = self._new()
        try:
            graph.deserialize(self._handle.raw, list(data))
            self._accept(int(graph.get_workspace_size()), "the stored plan")
        except (RuntimeError, ValueError, TypeError, module.cudnnGraphNotSupportedError) as e:
            raise UnsupportedError(
                f"cuDNN {version()} refuses the stored plan of {self._what} ({_first(e)}); build it again, or load it with rebuild=True"
            ) from e
        self._graph, self._index = graph, None

    def launch(self, addresses: Mapping[int, int], workspace: int, stream: int) -> None:
        """Launch on device addresses by operand number.

        Raises:
            UnsupportedError: the library refused the launch.
        """
        handle, pack = self._handle, dict(addresses)
        with handle.lock:
            handle.use_stream(stream)
            try:
                if self._index is None:
                    self._graph._execute(pack, workspace, handle.raw)
                else:
                    self._graph._execute_plan_at_index(pack, workspace, self._index, handle.raw)
            except RuntimeError as e:
                raise UnsupportedError(f"cuDNN {version()} failed to launch {self._what} ({_first(e)}); use another tactic") from e


def tensor(graph: Any, module: Any, number: int, dtype: str, dim: tuple[int, ...], strides: tuple[int, ...]) -> Any:
    """Add an operand to a graph under `number`, sizes and strides in elements."""
    assert all(0 < n <= MAX_DIM for n in dim)
    kind = {"fp16": module.data_type.HALF, "bf16": module.data_type.BFLOAT16, "fp32": module.data_type.FLOAT}[dtype]
    made = graph.tensor(name=f"operand{number}", dim=list(dim), stride=list(strides), data_type=kind)
    made.set_uid(number)
    return made


def output(made: Any, module: Any, number: int, dtype: str, dim: tuple[int, ...], strides: tuple[int, ...]) -> None:
    """Make a result an output under `number`."""
    kind = {"fp16": module.data_type.HALF, "bf16": module.data_type.BFLOAT16, "fp32": module.data_type.FLOAT}[dtype]
    made.set_output(True)
    made.set_data_type(kind)
    made.set_uid(number)
    made.set_dim(list(dim))
    made.set_stride(list(strides))
