"""cuBLASLt (dense) behind the same call as our kernels: products with a fused bias, ReLU or GELU and residual, and batched products.

It computes D^T = W . X^T column-major, which is D = X . W^T row-major, so no operand is transposed or copied.
"""

import threading
from typing import Any

import numpy as np

from twofour.errors import InputError, MissingExtraError, UnsupportedError
from twofour.kernels.gemm.contract import Problem
from twofour.kernels.gemm.nvmath import COMPUTE_32F, CUDA_TYPE, import_bindings
from twofour.kernels.matmul.contract import Problem as BatchedProblem

WORKSPACE_BYTES = 32 << 20  # what the library is offered; NVIDIA's advice for Hopper
MOST_ALGORITHMS = 16
_OP_N, _OP_T = 0, 1
_EPILOGUE = {
    ("none", False): 1,
    ("relu", False): 2,
    ("none", True): 4,
    ("relu", True): 6,
    ("gelu_tanh", False): 32,
    ("gelu_tanh", True): 36,
}


def why_not(problem: Problem | BatchedProblem) -> str | None:
    """Return why cuBLASLt cannot compute `problem` in one call, or None when it can."""
    if isinstance(problem, BatchedProblem):
        return None
    e = problem.epilogue
    if e.scale or e.gated:
        return "cublaslt has no epilogue that scales rows or multiplies by a gate"
    if e.activation not in ("none", "relu", "gelu_tanh"):
        return f"cublaslt has no epilogue {e.activation!r}, only relu and the tanh form of gelu"
    if problem.out_dtype not in (problem.dtype, "fp32"):
        return f"cublaslt cannot write {problem.out_dtype} from {problem.dtype}"
    if problem.out_dtype == "fp32" and e.activation != "none":
        return "cublaslt writes fp32 from 16-bit operands without an activation only"
    return None


class _Matmul:
    """A planned call: descriptors, the chosen algorithm, and a lock, because a bias address is part of a descriptor."""

    def __init__(self, what: object, algorithm: int, transpose: tuple[int, int], epilogue: int, bias_dtype: str) -> None:
        lt = import_bindings("cublasLt", "cublaslt")
        self._lt, self._what = lt, what
        self._lock = threading.Lock()
        try:
            self._handle = lt.create()
            self.version = str(lt.get_version())
        except (RuntimeError, OSError) as e:
            raise MissingExtraError(f"cuBLASLt could not be loaded ({e}); pip install 'twofour[peers]'") from e
        self._algorithm = algorithm
        self._desc = lt.matmul_desc_create(COMPUTE_32F, CUDA_TYPE["fp32"])
        attribute = lt.MatmulDescAttribute
        self._set(attribute.TRANSA, np.array([transpose[0]], np.int32))
        self._set(attribute.TRANSB, np.array([transpose[1]], np.int32))
        if epilogue != 1:
            self._set(attribute.EPILOGUE, np.array([epilogue], np.int32))
        if epilogue & 4:
            self._set(attribute.BIAS_DATA_TYPE, np.array([CUDA_TYPE[bias_dtype]], np.int32))
        self._bias = 0

    def _set(self, attribute: Any, value: Any) -> None:
        self._lt.matmul_desc_set_attribute(self._desc, attribute, value.ctypes.data, value.nbytes)

    def layout(self, dtype: str, rows: int, columns: int, pitch: int, batch: int = 1, batch_stride: int = 0) -> int:
        """Return a column-major layout."""
        lt = self._lt
        made = int(lt.matrix_layout_create(CUDA_TYPE[dtype], rows, columns, pitch))
        if batch > 1:
            for attribute, value in (
                (lt.MatrixLayoutAttribute.BATCH_COUNT, np.array([batch], np.int32)),
                (lt.MatrixLayoutAttribute.STRIDED_BATCH_OFFSET, np.array([batch_stride], np.int64)),
            ):
                lt.matrix_layout_set_attribute(made, attribute, value.ctypes.data, value.nbytes)
        return made

    def plan(self, a: int, b: int, d: int, alpha: float, beta: float) -> None:
        """Ask the heuristic and keep the algorithm."""
        lt, algorithm = self._lt, self._algorithm
        self._layouts = a, b, d
        preference = lt.matmul_preference_create()
        size = np.array([WORKSPACE_BYTES], np.uint64)
        lt.matmul_preference_set_attribute(preference, lt.MatmulPreferenceAttribute.MAX_WORKSPACE_BYTES, size.ctypes.data, 8)
        self._results = np.zeros(algorithm + 1, lt.matmul_heuristic_result_dtype)
        count = np.zeros(1, np.int32)
        try:
            lt.matmul_algo_get_heuristic(
                self._handle, self._desc, a, b, d, d, preference, algorithm + 1, self._results.ctypes.data, count.ctypes.data
            )
        except lt.cuBLASLtError as e:
            raise UnsupportedError(f"cuBLASLt refused {self._what} ({e}); use another tactic") from e
        finally:
            lt.matmul_preference_destroy(preference)
        if int(count[0]) <= algorithm:
            raise UnsupportedError(
                f"cuBLASLt offers {int(count[0])} algorithms for {self._what}, expected at least {algorithm + 1}; ask for a lower one"
            )
        self._algo = self._results.ctypes.data + algorithm * self._results.itemsize
        self._alpha, self._beta = np.array([alpha], np.float32), np.array([beta], np.float32)

    def launch(self, a: int, b: int, c: int, d: int, bias: int, workspace: int, stream: int) -> None:
        """Launch on device addresses."""
        lt = self._lt
        with self._lock:
            if bias != self._bias:
                self._set(lt.MatmulDescAttribute.BIAS_POINTER, np.array([bias], np.uint64))
                self._bias = bias
            layout_a, layout_b, layout_d = self._layouts
            lt.matmul(
                self._handle, self._desc, self._alpha.ctypes.data, a, layout_a, b, layout_b, self._beta.ctypes.data, c, layout_d, d,
                layout_d, self._algo, workspace, WORKSPACE_BYTES, stream,
            )  # fmt: skip


class CublasLt:
    """A product by cuBLASLt's `algorithm`-th heuristic. The weight is the plain dense matrix `[outputs, inputs]`."""

    workspace_bytes = WORKSPACE_BYTES

    def __init__(self, problem: Problem, algorithm: int = 0) -> None:
        """Plan the product.

        Raises:
            InputError: `why_not(problem)` has a reason. MissingExtraError: nvmath-python or cuBLASLt is missing.
            UnsupportedError: it offers no such algorithm.
        """
        reason = why_not(problem)
        if reason is not None:
            raise InputError(f"cublaslt cannot compute {problem}: {reason}")
        self.problem, e = problem, problem.epilogue
        self._matmul = _Matmul(problem, algorithm, (_OP_T, _OP_N), _EPILOGUE[e.activation, e.bias], problem.out_dtype)
        self.version = self._matmul.version
        a = self._matmul.layout(problem.dtype, problem.inputs, problem.outputs, problem.inputs)
        b = self._matmul.layout(problem.dtype, problem.inputs, problem.tokens, problem.inputs)
        d = self._matmul.layout(problem.out_dtype, problem.outputs, problem.tokens, problem.outputs)
        self._matmul.plan(a, b, d, 1.0, 1.0 if e.residual else 0.0)

    def __call__(self, x: int, weight: int, d: int, *, bias: int = 0, residual: int = 0, workspace: int = 0, stream: int = 0) -> None:
        """Launch on device addresses; `bias` is `[outputs]` of the output's type, `workspace` `workspace_bytes` of device memory."""
        self._matmul.launch(weight, x, residual or d, d, bias, workspace, stream)


class BatchedCublasLt:
    """A batched product of two activations by cuBLASLt's `algorithm`-th heuristic."""

    workspace_bytes = WORKSPACE_BYTES

    def __init__(self, problem: BatchedProblem, algorithm: int = 0) -> None:
        """Plan the product.

        Raises:
            MissingExtraError: nvmath-python or cuBLASLt is missing. UnsupportedError: it offers no such algorithm.
        """
        p = self.problem = problem
        forms = {name: self._form(p, name) for name in "abd"}
        # D row-major is D^T column-major, so B comes first; an operand that lies transposed is transposed back.
        self._matmul = _Matmul(p, algorithm, (forms["b"][0], forms["a"][0]), 1, p.dtype)
        self.version = self._matmul.version
        layouts = {name: self._matmul.layout(p.dtype, *forms[name][1:], p.batch, p.strides(name)[0]) for name in "abd"}
        self._matmul.plan(layouts["b"], layouts["a"], layouts["d"], p.scale, 0.0)

    @staticmethod
    def _form(p: BatchedProblem, name: str) -> tuple[int, int, int, int]:
        """(operation, rows, columns, pitch) of an operand's memory read column-major."""
        (_, rows, columns), (_, row_stride, column_stride) = p.shape(name), p.strides(name)
        if column_stride == 1 and row_stride >= columns:
            return _OP_N, columns, rows, row_stride
        return _OP_T, rows, columns, column_stride

    def __call__(self, a: int, b: int, d: int, *, workspace: int = 0, stream: int = 0) -> None:
        """Launch on device addresses."""
        self._matmul.launch(b, a, d, d, 0, workspace, stream)
