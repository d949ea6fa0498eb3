"""The ways in which one layer of an engine can be computed, and the weights in the form that each way reads."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np

from twofour.builder.graph import Array
from twofour.builder.lower import LayerCall
from twofour.builder.tactics.untrusted import Outcome, Trial
from twofour.kernels import families
from twofour.kernels.conv.cudnn import BY_GROUP, UNFUSED, is_fusible, one_group
from twofour.kernels.families import OURS
from twofour.kernels.gemm import contract as gemm
from twofour.kernels.pointwise import contract as pointwise
from twofour.pattern.pack_sm90 import pack

LIBRARIES = {"all": (OURS, "cublaslt", "cusparselt", "cudnn"), "ours": (OURS,)}
SPARSE_CONFIGS, DENSE_CONFIGS = 4, 2
CUBLASLT_ALGORITHMS = 3
TRIED_CUDNN = 4  # plans a layer; more than twenty layers with twelve plans each took minutes
TRIED_SMALL, SMALL_FLOPS = 10, 2e9  # a layer of few operations: which plan fills the GPU is hard to foresee, and trying one is short
NARROW = 16  # channels: narrower groups would leave a launch each too little to do
MOST_CUDNN, MOST_SMALL = 2, 3  # of the plans that ran alone, the fastest are timed against the other ways


@dataclass(frozen=True)
class Way:
    """One way to compute a layer: who does it, in which family's terms, and with which setting.

    Attributes:
        family: the layer's own, or one that its problem is restated for: a convolution may be computed as a product.
        config: of our kernels. algorithm: of a library.
        after: a pointwise step on the output, in place; None: the problem is the whole layer.
    """

    family: str
    library: str
    problem: Any
    config: Any = None
    algorithm: int | None = None
    after: "Way | None" = None

    @property
    def is_sparse(self) -> bool:
        """Whether it uses the zeros."""
        return bool(getattr(self.problem, "sparse", False))

    def __str__(self) -> str:
        return f"{self._name()}, activation apart" if self.after is not None else self._name()

    def _name(self) -> str:
        c = self.config
        if self.family == "gemm" and c is not None:
            form = "2:4" if self.is_sparse else "dense"
            return f"{OURS} {form} {c.tile}{' split' if c.split else ''}"
        if c is not None:
            return f"{OURS} {self.family} " + " ".join(str(value) for value in vars(c).values())
        if self.library != "cudnn":
            return self.library if self.algorithm is None else f"{self.library} {self.algorithm}"
        number = self.algorithm or 0
        return f"cudnn {number % UNFUSED}{', epilogue apart' * bool(number & UNFUSED)}{', group by group' * bool(number & BY_GROUP)}"


def ways_of(
    call: LayerCall, *, sparsity: str = "auto", libraries: Sequence[str] = LIBRARIES["all"], sms: int = 132
) -> tuple[list[Way], dict[str, str]]:
    """Return the ways worth timing, and why others are left out, by library; those that must be tried alone apart (`trials_of`).

    A sparse way is listed where the weight is 2:4 and `sparsity` is not `off`; a dense one always: an engine is never slower for its zeros.
    """
    found: list[Way] = []
    left: dict[str, str] = {}
    product = _product_of(call)
    if product is not None:
        sparse = call.is_24 and sparsity != "off"
        if not sparse:
            left["2:4"] = call.why_not_24 or "sparsity is off"
        found += _products(product, sparse, libraries, sms, left)
    elif call.family == "conv":
        left["2:4"] = call.why_not_24
    if call.family == "matmul" and "cublaslt" in libraries:
        found += [Way("matmul", "cublaslt", call.problem, None, i) for i in range(CUBLASLT_ALGORITHMS)]
    for name, problem in {call.family: call.problem, **families.restated(call.family, call.problem)}.items():
        found += _plain(name, problem, sms, left)
    return found, left


def _plain(name: str, problem: Any, sms: int, left: dict[str, str]) -> list[Way]:
    """Return the ways of a plain family, none of another one; where it has none, `left` says why."""
    kind = families.family(name)
    if kind.launcher is None or kind.candidates is None or kind.config is None or kind.why_not is None:
        return []
    found = [Way(name, OURS, problem, config) for config in kind.candidates(problem, sms)]
    reason = None if found else kind.why_not(problem, kind.config())
    if reason is not None:
        left[f"{OURS} {name}"] = reason
    return found


def trials_of(
    call: LayerCall, *, sparsity: str = "auto", libraries: Sequence[str] = LIBRARIES["all"]
) -> tuple[list[Trial], dict[str, str]]:
    """Return what libraries offer for a call without vouching for it, and why a library is left out, by its name."""
    found: list[Trial] = []
    left: dict[str, str] = {}
    if "cudnn" in libraries and call.family in ("conv", "attention"):
        reason = families.why_not(call.family, "cudnn", call.problem, None)
        if reason is not None:
            left["cudnn"] = reason
        else:
            most = TRIED_SMALL if call.problem.flops < SMALL_FLOPS else TRIED_CUDNN
            found += [Trial(call.family, call.problem, form, most) for form in _forms(call)]
    product = _product_of(call)
    if "cusparselt" in libraries and product is not None and call.is_24 and sparsity != "off":
        asked, after = _by_library("cusparselt", replace(product, sparse=True), left)
        if asked is not None:
            # The search takes a second or two, for nothing where a launch decides.
            most = 1 if asked.flops < SMALL_FLOPS else 2
            found.append(Trial("gemm", asked, most=most, library="cusparselt", after=after))
    return found, left


def _forms(call: LayerCall) -> list[int]:
    """Return the forms in which cuDNN's plans are tried."""
    if call.family != "conv":
        return [0]
    form = 0 if is_fusible(call.problem) else UNFUSED
    part = one_group(call.problem)
    return [form, form | BY_GROUP] if part is not None and part.inputs >= NARROW else [form]


def tried_ways(trial: Trial, outcome: Outcome, left: dict[str, str]) -> list[Way]:
    """Return the fastest of what ran alone; why others are left out goes to `left`."""
    if outcome.reason is not None:
        left[f"{trial.library}{', group by group' * bool(trial.form & BY_GROUP)}"] = outcome.reason
    if trial.library == "cusparselt":
        left |= {f"cusparselt's {'search' if plan else 'default'}": why for plan, why in outcome.left_out.items()}
        return [Way("gemm", "cusparselt", trial.problem, None, None if best < 0 else best, trial.after) for best in outcome.best(1)]
    most = MOST_SMALL if trial.problem.flops < SMALL_FLOPS else MOST_CUDNN
    left |= {str(Way(trial.family, "cudnn", trial.problem, None, trial.form + plan)): why for plan, why in outcome.left_out.items()}
    return [Way(trial.family, "cudnn", trial.problem, None, trial.form + plan) for plan in outcome.best(most)]


def _product_of(call: LayerCall) -> gemm.Problem | None:
    """Return the matrix product that a call is, if it is one."""
    if call.family == "gemm":
        product: gemm.Problem = call.problem
        return product
    stated: gemm.Problem | None = families.restated(call.family, call.problem).get("gemm")
    return stated


def _activation_apart(product: gemm.Problem) -> tuple[gemm.Problem, Way] | None:
    """Return the product without its activation, and the step that activates its output in place; None where little would be gained.

    A library lacks most activations; and in our kernels an activation of many instructions holds the next tile up.
    """
    e = product.epilogue
    if e.activation in ("none", "relu") or e.gated:
        return None
    elements = product.tokens * product.outputs
    step: pointwise.Instruction = (e.activation, ("in", 0))
    if e.activation == "relu6":
        step = ("clip", ("in", 0), ("c", 0.0), ("c", 6.0))
    problem = pointwise.Problem((elements,), (pointwise.Operand(product.out_dtype, (1,)),), product.out_dtype, (1,), (step,))
    after = Way("pointwise", OURS, problem, pointwise.default(problem))
    return replace(product, epilogue=replace(e, activation="none")), after


def _products(product: gemm.Problem, sparse: bool, libraries: Sequence[str], sms: int, left: dict[str, str]) -> list[Way]:
    found = []
    parts = _activation_apart(product)
    for form in (True, False) if sparse else (False,):
        problem = replace(product, sparse=form)
        count = SPARSE_CONFIGS if form else DENSE_CONFIGS
        if OURS in libraries:
            found += [Way("gemm", OURS, problem, config) for config in gemm.candidates(problem, sms, count)]
            if parts is not None:
                plain = replace(parts[0], sparse=form)
                found += [Way("gemm", OURS, plain, config, after=parts[1]) for config in gemm.candidates(plain, sms, count // 2)]
        if not form and "cublaslt" in libraries:
            asked, after = _by_library("cublaslt", problem, left)
            found += [Way("gemm", "cublaslt", asked, None, i, after) for i in range(CUBLASLT_ALGORITHMS) if asked is not None]
    return found


def _by_library(library: str, problem: gemm.Problem, left: dict[str, str]) -> tuple[gemm.Problem | None, Way | None]:
    """Return what a library is asked for, whole or with the activation apart; None where it can do neither, and `left` says why."""
    reason = families.why_not("gemm", library, problem, None)
    if reason is None:
        return problem, None
    parts = _activation_apart(problem)
    if parts is not None and families.why_not("gemm", library, parts[0], None) is None:
        return parts
    left[library] = reason
    return None, None


def in_dtype(values: Array, dtype: str) -> Array:
    """Return fp32 values rounded to `dtype`; bf16 as its bits in uint16."""
    if dtype == "bf16":
        return np.ascontiguousarray(values.astype(ml_dtypes.bfloat16)).view(np.uint16)
    return np.ascontiguousarray(values.astype({"fp16": np.float16, "fp32": np.float32}[dtype]))


def weight_for(call: LayerCall, way: Way) -> Array:
    """Return the call's weight as `way` reads it; for cuSPARSELt the dense form, which its `compress` takes."""
    assert call.weight is not None
    bits = in_dtype(call.weight, way.problem.dtype)
    pack_plain = families.family(way.family).pack
    if pack_plain is not None:
        return pack_plain(way.problem, bits)
    if way.family != "gemm":
        return bits
    rows = bits.reshape(way.problem.weight_rows, way.problem.inputs)
    if way.library != OURS:
        return rows
    packed = pack(rows, dtype=way.problem.dtype, sparse=way.is_sparse, layer=call.name).data
    return np.ascontiguousarray(packed).reshape(-1).view(np.uint8)


def bias_for(call: LayerCall, way: Way) -> Array | None:
    """Return the call's bias as `way` reads it."""
    if call.bias is None:
        return None
    out = getattr(way.problem, "out_dtype", way.problem.dtype)
    return in_dtype(call.bias, families.bias_dtype(way.library, out))
