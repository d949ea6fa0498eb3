"""cuBLASLt (dense) and cuSPARSELt (2:4) behind the same call as our kernels, through the bare bindings of nvmath-python.

Both compute D^T = W . X^T column-major, which is D = X . W^T row-major, so no operand is transposed or copied.
"""

import ctypes
from typing import Any

import numpy as np

from twofour.errors import MissingExtraError, UnsupportedError
from twofour.jit.driver import Buffer, bindings, check
from twofour.kernels.gemm.contract import Problem

WORKSPACE_BYTES = 64 << 20
_CUDA_TYPE = {"bf16": 14, "fp16": 2, "fp32": 0}  # cudaDataType
_COMPUTE_32F = 68  # cublasComputeType_t
_OP_N, _OP_T = 0, 1
_ORDER_COL, _ORDER_ROW = 1, 2


def _import(name: str, package: str) -> Any:
    import importlib

    try:
        return importlib.import_module(f"nvmath.bindings.{name}")
    except ImportError as e:
        raise MissingExtraError(
            f"the {package} tactic needs nvmath-python, which could not be imported ({e}); pip install 'twofour[peers]'"
        ) from e


def why_not(library: str, problem: Problem) -> str | None:
    """Return why a library cannot compute `problem` in one call, or None when it can."""
    e = problem.epilogue
    if e.activation != "none" or e.scale or e.bias or e.residual or e.gated:
        return f"{library} is called for plain products only, this one has an epilogue"
    if problem.out_dtype not in (problem.dtype, "fp32"):
        return f"{library} cannot write {problem.out_dtype} from {problem.dtype}"
    if library == "cusparselt" and problem.out_dtype != problem.dtype:
        return f"cusparselt writes {problem.dtype} from {problem.dtype}, not {problem.out_dtype}"
    if library == "cusparselt" and (problem.inputs % 16 or problem.tokens % 8):
        return f"cusparselt needs inputs in multiples of 16 and tokens in multiples of 8, got {problem.inputs} and {problem.tokens}"
    return None


class CublasLt:
    """cuBLASLt with its `algorithm`-th heuristic. The weight is the plain dense matrix `[outputs, inputs]`."""

    def __init__(self, problem: Problem, algorithm: int = 0) -> None:
        """Plan the product.

        Raises:
            MissingExtraError: nvmath-python or cuBLASLt is missing. UnsupportedError: it offers no such algorithm.
        """
        lt = _import("cublasLt", "cublaslt")
        self._lt, self.problem = lt, problem
        try:
            self._handle = lt.create()
            self.version = str(lt.get_version())
        except (RuntimeError, OSError) as e:
            raise MissingExtraError(f"cuBLASLt could not be loaded ({e}); pip install 'twofour[peers]'") from e
        kind, out = _CUDA_TYPE[problem.dtype], _CUDA_TYPE[problem.out_dtype]
        self._desc = lt.matmul_desc_create(_COMPUTE_32F, _CUDA_TYPE["fp32"])
        transpose = np.array([_OP_T], np.int32)
        lt.matmul_desc_set_attribute(self._desc, lt.MatmulDescAttribute.TRANSA, transpose.ctypes.data, 4)
        self._a = lt.matrix_layout_create(kind, problem.inputs, problem.outputs, problem.inputs)
        self._b = lt.matrix_layout_create(kind, problem.inputs, problem.tokens, problem.inputs)
        self._d = lt.matrix_layout_create(out, problem.outputs, problem.tokens, problem.outputs)
        preference = lt.matmul_preference_create()
        size = np.array([WORKSPACE_BYTES], np.uint64)
        lt.matmul_preference_set_attribute(preference, lt.MatmulPreferenceAttribute.MAX_WORKSPACE_BYTES, size.ctypes.data, 8)
        self._results = np.zeros(algorithm + 1, lt.matmul_heuristic_result_dtype)
        count = np.zeros(1, np.int32)
        where, number = self._results.ctypes.data, count.ctypes.data
        try:
            lt.matmul_algo_get_heuristic(
                self._handle, self._desc, self._a, self._b, self._d, self._d, preference, algorithm + 1, where, number
            )
        except lt.cuBLASLtError as e:
            raise UnsupportedError(f"cuBLASLt refused {problem} ({e}); use another tactic") from e
        lt.matmul_preference_destroy(preference)
        if int(count[0]) <= algorithm:
            raise UnsupportedError(
                f"cuBLASLt offers {int(count[0])} algorithms for {problem}, expected at least {algorithm + 1}; ask for a lower one"
            )
        self._algo = self._results.ctypes.data + algorithm * self._results.itemsize
        self._one, self._zero = np.ones(1, np.float32), np.zeros(1, np.float32)
        self._workspace = Buffer(WORKSPACE_BYTES)

    def __call__(self, x: int, weight: int, d: int, stream: int = 0) -> None:
        """Launch on device addresses."""
        lt = self._lt
        lt.matmul(
            self._handle, self._desc, self._one.ctypes.data, weight, self._a, x, self._b, self._zero.ctypes.data, d, self._d, d, self._d,
            self._algo, self._workspace.pointer, WORKSPACE_BYTES, stream,
        )  # fmt: skip


class CusparseLt:
    """cuSPARSELt after its own search on the given operands. The weight is what `compress` returns."""

    def __init__(self, problem: Problem) -> None:
        """Plan the product with the default algorithm; `search` looks for a better one.

        Raises:
            MissingExtraError: nvmath-python or cuSPARSELt is missing. UnsupportedError: it refuses the problem.
        """
        lt = _import("cusparseLt", "cusparselt")
        self._lt, self.problem = lt, problem
        try:
            self._handle = lt.init()
            self.version = str(lt.get_version(self._handle))
        except (RuntimeError, OSError) as e:
            raise MissingExtraError(f"cuSPARSELt could not be loaded ({e}); pip install 'twofour[peers]'") from e
        p, kind = problem, _CUDA_TYPE[problem.dtype]
        try:
            self._a = lt.structured_descriptor_init(self._handle, p.outputs, p.inputs, p.inputs, 16, kind, _ORDER_ROW, 0)
            self._b = lt.dense_descriptor_init(self._handle, p.tokens, p.inputs, p.inputs, 16, kind, _ORDER_ROW)
            self._d = lt.dense_descriptor_init(self._handle, p.outputs, p.tokens, p.outputs, 16, kind, _ORDER_COL)
            compute = lt.ComputeType.COMPUTE_32F
            self._desc = lt.matmul_descriptor_init(self._handle, _OP_N, _OP_T, self._a, self._b, self._d, self._d, compute)
            self._algorithm = lt.matmul_alg_selection_init(self._handle, self._desc, lt.MatmulAlg.DEFAULT)
            self._plan = lt.matmul_plan_init(self._handle, self._desc, self._algorithm)
        except lt.cuSPARSELtError as e:
            raise UnsupportedError(f"cuSPARSELt refused {problem} ({e}); use another tactic") from e
        self._one, self._zero = np.ones(1, np.float32), np.zeros(1, np.float32)
        self._streams = (ctypes.c_void_p * 1)(0)
        self._workspace = Buffer(max(WORKSPACE_BYTES, int(lt.matmul_get_workspace(self._handle, self._plan))))

    def compress(self, weight: int, stream: int = 0) -> Buffer:
        """Return the compressed form of a dense 2:4 weight `[outputs, inputs]`."""
        lt = self._lt
        size, scratch_size = lt.sp_mma_compressed_size(self._handle, self._plan)
        compressed, scratch = Buffer(int(size)), Buffer(int(scratch_size))
        lt.sp_mma_compress(self._handle, self._plan, weight, compressed.pointer, scratch.pointer, stream)
        check(bindings().cuStreamSynchronize(stream), "compressing a weight")
        return compressed

    def search(self, x: int, compressed: int, d: int, stream: int = 0) -> None:
        """Let the library time its algorithms, split-K included, on these operands; its fastest is used from now on."""
        self._streams[0] = stream
        lt = self._lt
        one, zero, space = self._one.ctypes.data, self._zero.ctypes.data, self._workspace.pointer
        try:
            lt.matmul_search(self._handle, self._plan, one, compressed, x, zero, d, d, space, ctypes.addressof(self._streams), 1)
        except lt.cuSPARSELtError as e:
            raise UnsupportedError(f"cuSPARSELt could not search its algorithms for {self.problem} ({e}); use another tactic") from e
        check(bindings().cuStreamSynchronize(stream), "searching cuSPARSELt's algorithms")
        self._workspace = Buffer(max(WORKSPACE_BYTES, int(lt.matmul_get_workspace(self._handle, self._plan))))

    def __call__(self, x: int, weight: int, d: int, stream: int = 0) -> None:
        """Launch on device addresses; `weight` is a compressed one's."""
        self._streams[0] = stream
        self._lt.matmul(
            self._handle, self._plan, self._one.ctypes.data, weight, x, self._zero.ctypes.data, d, d, self._workspace.pointer,
            ctypes.addressof(self._streams), 1,
        )  # fmt: skip
