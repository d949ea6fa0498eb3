"""cuSPARSELt (2:4) behind the same call as our kernels: products with a fused bias, ReLU and residual.

It computes D^T = W . X^T column-major, which is D = X . W^T row-major, so no operand is transposed or copied.
"""

import ctypes
import threading
from typing import Any

import numpy as np

from twofour.errors import InputError, MissingExtraError, UnsupportedError
from twofour.jit.driver import Buffer, bindings, check
from twofour.kernels.gemm.contract import Problem
from twofour.kernels.gemm.nvmath import CUDA_TYPE, import_bindings

WORKSPACE_BYTES = 64 << 20
_OP_N, _OP_T = 0, 1
_ORDER_COL, _ORDER_ROW = 1, 2
# An algorithm as one number: configuration in bits 0-7, split-K factor in bits 8-12, split-K mode in bits 13-14.
_FACTOR_SHIFT, _MODE_SHIFT = 8, 13


def why_not(problem: Problem) -> str | None:
    """Return why cuSPARSELt cannot compute `problem` in one call, or None when it can."""
    e = problem.epilogue
    if not problem.sparse:
        return "the weight is dense, cusparselt needs a 2:4 weight"
    if e.scale or e.gated:
        return "cusparselt is not asked to scale rows or multiply by a gate"
    if e.activation not in ("none", "relu"):
        return f"cusparselt has no epilogue {e.activation!r}, only relu"
    if problem.out_dtype != problem.dtype:
        return f"cusparselt writes {problem.dtype} from {problem.dtype}, not {problem.out_dtype}"
    if problem.inputs % 16 or problem.outputs % 16 or problem.tokens % 8:
        sizes = f"{problem.inputs}, {problem.outputs} and {problem.tokens}"
        return f"cusparselt needs inputs and outputs in multiples of 16 and tokens in multiples of 8, got {sizes}"
    return None


class CusparseLt:
    """A product by cuSPARSELt. The weight is what `compress` returns. One object is used by one thread at a time."""

    def __init__(self, problem: Problem, algorithm: int | None = None) -> None:
        """Plan the product with `algorithm` (a number that `search` returned), else with the default; `search` looks for a better one.

        Raises:
            InputError: `why_not(problem)` has a reason. MissingExtraError: nvmath-python or cuSPARSELt is missing.
            UnsupportedError: it refuses the problem.
        """
        reason = why_not(problem)
        if reason is not None:
            raise InputError(f"cusparselt cannot compute {problem}: {reason}")
        lt = import_bindings("cusparseLt", "cusparselt")
        self._lt, self.problem = lt, problem
        self._lock = threading.Lock()
        try:
            self._handle = lt.init()
            self.version = str(lt.get_version(self._handle))
        except (RuntimeError, OSError) as e:
            raise MissingExtraError(f"cuSPARSELt could not be loaded ({e}); pip install 'twofour[peers]'") from e
        p, kind = problem, CUDA_TYPE[problem.dtype]
        try:
            self._a = lt.structured_descriptor_init(self._handle, p.outputs, p.inputs, p.inputs, 16, kind, _ORDER_ROW, 0)
            self._b = lt.dense_descriptor_init(self._handle, p.tokens, p.inputs, p.inputs, 16, kind, _ORDER_ROW)
            self._d = lt.dense_descriptor_init(self._handle, p.outputs, p.tokens, p.outputs, 16, kind, _ORDER_COL)
        except lt.cuSPARSELtError as e:
            raise UnsupportedError(f"cuSPARSELt refused {problem} ({e}); use another tactic") from e
        self._one, self._beta = np.ones(1, np.float32), np.array([1.0 if p.epilogue.residual else 0.0], np.float32)
        self._streams = (ctypes.c_void_p * 1)(0)
        self._bias, self._found = 0, algorithm
        self._plans: dict[int, tuple[Any, Any, Any]] = {}
        self._plan_with(0, algorithm)

    def _plan_with(self, bias: int, algorithm: int | None) -> None:
        """Make the plan anew: a bias address is part of it."""
        lt, e = self._lt, self.problem.epilogue
        try:
            compute = lt.ComputeType.COMPUTE_32F
            self._desc = lt.matmul_descriptor_init(self._handle, _OP_N, _OP_T, self._a, self._b, self._d, self._d, compute)
            attribute = lt.MatmulDescAttribute
            if e.activation == "relu":
                self._set_desc(attribute.ACTIVATION_RELU, np.ones(1, np.int32))
            if e.bias and bias:
                self._set_desc(attribute.BIAS_POINTER, np.array([bias], np.uint64))
            self._algorithm = lt.matmul_alg_selection_init(self._handle, self._desc, lt.MatmulAlg.DEFAULT)
            if algorithm is not None:
                kinds = lt.MatmulAlgAttribute
                values = [(kinds.CONFIG_ID, algorithm & 255)]
                factor = algorithm >> _FACTOR_SHIFT & 31
                if factor > 1:
                    values += [(kinds.SPLIT_K, factor), (kinds.SPLIT_K_MODE, algorithm >> _MODE_SHIFT & 3)]
                for kind, value in values:
                    number = np.array([value], np.int32)
                    lt.matmul_alg_set_attribute(self._handle, self._algorithm, kind, number.ctypes.data, 4)
            self._plan = lt.matmul_plan_init(self._handle, self._desc, self._algorithm)
            self.workspace_bytes = int(lt.matmul_get_workspace(self._handle, self._plan))
            self._plans[bias] = (self._desc, self._algorithm, self._plan)
        except lt.cuSPARSELtError as e2:
            raise UnsupportedError(f"cuSPARSELt refused {self.problem} with algorithm {algorithm} ({e2}); use another tactic") from e2

    def _set_desc(self, attribute: Any, value: Any) -> None:
        self._lt.matmul_desc_set_attribute(self._handle, self._desc, attribute, value.ctypes.data, value.nbytes)

    @property
    def compressed_bytes(self) -> int:
        """Bytes of a compressed weight."""
        return int(self._lt.sp_mma_compressed_size(self._handle, self._plan)[0])

    def compress(self, weight: int, stream: int = 0) -> Buffer:
        """Return the compressed form of a dense 2:4 weight `[outputs, inputs]`."""
        lt = self._lt
        size, scratch_size = lt.sp_mma_compressed_size(self._handle, self._plan)
        compressed, scratch = Buffer(int(size)), Buffer(int(scratch_size))
        lt.sp_mma_compress(self._handle, self._plan, weight, compressed.pointer, scratch.pointer, stream)
        check(bindings().cuStreamSynchronize(stream), "compressing a weight")
        return compressed

    def search(self, x: int, compressed: int, d: int, *, bias: int = 0, residual: int = 0, stream: int = 0) -> int:
        """Let the library time its algorithms, split-K included, on these operands; return the fastest one's number, used from now on."""
        self._streams[0] = stream
        lt = self._lt
        self._use_bias(bias)
        space = Buffer(max(WORKSPACE_BYTES, self.workspace_bytes))
        one, beta = self._one.ctypes.data, self._beta.ctypes.data
        try:
            lt.matmul_search(
                self._handle, self._plan, one, compressed, x, beta, residual or d, d, space.pointer, ctypes.addressof(self._streams), 1
            )
        except lt.cuSPARSELtError as e:
            raise UnsupportedError(f"cuSPARSELt could not search its algorithms for {self.problem} ({e}); use another tactic") from e
        check(bindings().cuStreamSynchronize(stream), "searching cuSPARSELt's algorithms")
        self.workspace_bytes = int(lt.matmul_get_workspace(self._handle, self._plan))
        if self.workspace_bytes > WORKSPACE_BYTES:
            raise UnsupportedError(f"cuSPARSELt's fastest for {self.problem} wants {self.workspace_bytes} bytes; use another tactic")
        kinds, numbers = lt.MatmulAlgAttribute, []
        for kind in (kinds.CONFIG_ID, kinds.SPLIT_K, kinds.SPLIT_K_MODE):
            number = np.zeros(1, np.int32)
            lt.matmul_alg_get_attribute(self._handle, self._algorithm, kind, number.ctypes.data, 4)
            numbers.append(int(number[0]))
        config, factor, mode = numbers
        self._plans = {self._bias: self._plans[self._bias]}  # the others are of the earlier algorithm
        self._found = config | max(factor, 0) << _FACTOR_SHIFT | max(mode, 0) << _MODE_SHIFT
        return self._found

    def _use_bias(self, bias: int) -> None:
        """Take the plan of a bias address. Making one takes up to tens of milliseconds, so each is kept."""
        if bias == self._bias:
            return
        if bias in self._plans:
            self._desc, self._algorithm, self._plan = self._plans[bias]
        else:
            self._plan_with(bias, self._found)
        self._bias = bias

    def __call__(self, x: int, weight: int, d: int, *, bias: int = 0, residual: int = 0, workspace: int = 0, stream: int = 0) -> None:
        """Launch on device addresses; `weight` is a compressed one's, `bias` `[outputs]` of the output's type.

        Raises:
            UnsupportedError: the library refuses the launch.
        """
        with self._lock:
            self._use_bias(bias)
            self._streams[0] = stream
            try:
                self._lt.matmul(
                    self._handle, self._plan, self._one.ctypes.data, weight, x, self._beta.ctypes.data, residual or d, d, workspace,
                    ctypes.addressof(self._streams), 1,
                )  # fmt: skip
            except self._lt.cuSPARSELtError as e:
                raise UnsupportedError(f"cuSPARSELt could not compute {self.problem} ({e}); use another tactic") from e
