"""Which way to compute a matrix product: our kernels and the libraries, legal by `why_not`, chosen by model or by measurement."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from math import inf
from pathlib import Path
from typing import Any

from twofour.builder.tactics.versions import installed
from twofour.errors import InputError, MissingExtraError, UnsupportedError
from twofour.files import write_text
from twofour.jit.driver import Buffer, bindings, check, num_sms
from twofour.kernels.gemm import contract, cublaslt, cusparselt
from twofour.kernels.gemm.contract import Config, Problem
from twofour.kernels.gemm.launch import Gemm
from twofour.kernels.gemm.source import sources_digest
from twofour.pattern.pack_sm90 import pack
from twofour.timing.gpu import Candidate, Stopwatch, sets_for

logger = logging.getLogger(__name__)
LIBRARIES = ("twofour", "cublaslt", "cusparselt")
MOST_TIMED = 8
CUBLASLT_ALGORITHMS = 3


@dataclass(frozen=True)
class Tactic:
    """One way to compute a Problem: a library, whether it uses the zeros, and its setting.

    `config` is our kernels'; `algorithm` is cuBLASLt's heuristic number.
    """

    library: str
    sparse: bool
    config: Config | None = None
    algorithm: int = 0

    def __str__(self) -> str:
        if self.config is None:
            return f"{self.library}:{self.algorithm}" if self.library == "cublaslt" else self.library
        c = self.config
        return f"twofour:{'2:4' if self.sparse else 'dense'}:{c.tile}{':split' if c.split else ''}"


def why_not(problem: Problem, tactic: Tactic) -> str | None:
    """Return why `tactic` cannot compute `problem`, or None when it can."""
    if tactic.sparse and not problem.sparse:
        return "the weight is dense, a 2:4 tactic needs a 2:4 weight"
    if tactic.library == "twofour":
        return contract.why_not(replace(problem, sparse=tactic.sparse), tactic.config or Config())
    if tactic.library not in LIBRARIES:
        return f"library {tactic.library!r} is not one of {', '.join(LIBRARIES)}"
    if tactic.library == "cusparselt":
        return cusparselt.why_not(problem)
    return cublaslt.why_not(problem)


def tactics(problem: Problem, sms: int = 132, *, libraries: Sequence[str] = LIBRARIES, limit: int = MOST_TIMED) -> list[Tactic]:
    """Return at most `limit` legal tactics, the modelled best first. A 2:4 weight may also be computed densely: never slower."""
    found = []
    if "twofour" in libraries:
        dense = [Tactic("twofour", False, c) for c in contract.candidates(replace(problem, sparse=False), sms, 1 if problem.sparse else 4)]
        sparse = [Tactic("twofour", True, c) for c in contract.candidates(problem, sms, 4)] if problem.sparse else []
        found += sparse + dense
    if "cusparselt" in libraries and problem.sparse:
        found.append(Tactic("cusparselt", True))
    if "cublaslt" in libraries:
        found += [Tactic("cublaslt", False, algorithm=i) for i in range(CUBLASLT_ALGORITHMS)]
    return [t for t in found if why_not(problem, t) is None][:limit]


@dataclass(frozen=True)
class Prepared:
    """A tactic ready to run: `adopt` turns a dense weight tensor into what `call` wants (its owner keeps it alive)."""

    tactic: Tactic
    call: Callable[[int, int, int, int], None]
    adopt: Callable[[Any], Any]
    version: str
    search: Callable[[int, int, int], object] | None = None  # a library's own search over its algorithms, on (x, weight, d)

    def address(self, adopted: Any) -> int:
        """Return the device address of an adopted weight."""
        return int(adopted.pointer if isinstance(adopted, Buffer) else adopted.data_ptr())


def prepare(problem: Problem, tactic: Tactic, device: int = 0, *, overlap: bool = False) -> Prepared:
    """Return `tactic` planned and compiled for `problem`: `call(x, weight, d, stream)` launches a plain product.

    Args:
        overlap: our kernels are launched while the one before drains, as engines do it; `twofour.nn` does not.

    Raises:
        InputError: `why_not` has a reason. MissingExtraError, UnsupportedError: it cannot run here.
    """
    reason = why_not(problem, tactic)
    if reason is not None:
        raise InputError(f"{tactic} cannot compute {problem}: {reason}")
    if tactic.library == "cublaslt":
        lt = cublaslt.CublasLt(problem, tactic.algorithm)
        space = Buffer(lt.workspace_bytes)

        def call_dense(x: int, weight: int, d: int, stream: int) -> None:
            lt(x, weight, d, workspace=space.pointer, stream=stream)

        return Prepared(tactic, call_dense, lambda weight: weight, lt.version)
    if tactic.library == "cusparselt":
        sparse_lt = cusparselt.CusparseLt(problem)
        sparse_space = Buffer(cusparselt.WORKSPACE_BYTES)

        def call_sparse(x: int, weight: int, d: int, stream: int) -> None:
            sparse_lt(x, weight, d, workspace=sparse_space.pointer, stream=stream)

        return Prepared(
            tactic, call_sparse, lambda weight: sparse_lt.compress(weight.data_ptr()), sparse_lt.version, search=sparse_lt.search
        )
    ours = Gemm(replace(problem, sparse=tactic.sparse), tactic.config, device=device, overlap=overlap)
    workspace = Buffer(ours.workspace_bytes, zeroed=True)

    def call(x: int, weight: int, d: int, stream: int) -> None:
        ours(x, weight, d, workspace=workspace.pointer, stream=stream)

    def adopt(weight: Any) -> Any:
        return pack(weight, dtype=problem.dtype, sparse=tactic.sparse, gated=problem.epilogue.gated).data

    return Prepared(tactic, call, adopt, sources_digest())


class Operands:
    """Random operand sets of a problem on the GPU, together at least 3 x the L2: `x`, dense weights (2:4 if the problem is) and outputs."""

    def __init__(self, problem: Problem, l2_bytes: int, *, seed: int = 0, most: int = 8) -> None:
        """Draw normal activations and weights of standard deviation 0.05, the weight pruned to the two largest of four."""
        import torch

        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
        size = problem.tokens * problem.inputs * 2 + problem.weight_rows * problem.inputs + problem.tokens * problem.outputs * 2
        self.sets = sets_for(size, l2_bytes, most)
        generator = torch.Generator("cuda").manual_seed(seed)
        self.x, self.weight, self.d = [], [], []
        for _ in range(self.sets):
            self.x.append(torch.randn(problem.tokens, problem.inputs, device="cuda", generator=generator).to(dtype[problem.dtype]))
            weight = torch.randn(problem.weight_rows, problem.inputs, device="cuda", generator=generator) * 0.05
            if problem.sparse:
                groups = weight.view(-1, 4)
                keep = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, groups.abs().topk(2, dim=1).indices, True)
                weight = torch.where(keep, groups, 0).view(weight.shape)
            self.weight.append(weight.to(dtype[problem.dtype]))
            self.d.append(torch.empty(problem.tokens, problem.outputs, device="cuda", dtype=dtype[problem.out_dtype]))
        torch.cuda.synchronize()

    def candidate(self, prepared: Prepared) -> Candidate:
        """Return a timing candidate of `prepared` that walks through the sets."""
        import torch

        # Every set gets its own adopted weight, so that weights come from memory.
        adopted = [prepared.adopt(weight) for weight in self.weight]
        torch.cuda.synchronize()
        rows = [(self.x[i].data_ptr(), prepared.address(adopted[i]), self.d[i].data_ptr()) for i in range(self.sets)]

        def enqueue(i: int, stream: int, _alive: Any = (self, adopted)) -> None:
            prepared.call(*rows[i], stream)

        if prepared.search is not None:
            prepared.search(*rows[0])
        return Candidate(str(prepared.tactic), enqueue, self.sets)


@dataclass(frozen=True)
class Choice:
    """The tactic for a problem, each candidate's median microseconds (empty when modelled), and why others were left out."""

    tactic: Tactic
    times_us: dict[str, float]
    left_out: dict[str, str]

    def __str__(self) -> str:
        if not self.times_us:
            return f"{self.tactic} (modelled, not timed)"
        ranked = sorted(self.times_us.items(), key=lambda item: item[1])
        return f"{self.tactic}: " + ", ".join(f"{name} {us:.1f} us" for name, us in ranked)


def modelled(problem: Problem, sms: int = 132) -> Choice:
    """Return the choice without timing anything: the model's best config of our kernels."""
    return Choice(Tactic("twofour", problem.sparse, contract.default(problem, sms)), {}, {})


def choose(problem: Problem, *, device: int = 0, libraries: Sequence[str] = LIBRARIES, cache_folder: Path | None = None) -> Choice:
    """Return the fastest tactic for `problem` on this GPU, measured by `timing/gpu.py` (burst, cold L2, interleaved) and remembered.

    Remembered per GPU, driver, library versions, kernel sources and problem. Concurrent processes may measure the same thing twice;
    files appear whole by a rename. The epilogue is left out of the timing except where only our kernels can compute the problem.

    Raises:
        MissingExtraError, UnsupportedError: nothing can run here.
    """
    watch = Stopwatch(device)
    candidates = tactics(problem, num_sms(device), libraries=libraries)
    path = _remembered_at(problem, candidates, watch, cache_folder)
    known = _recall(path, candidates)
    if known is not None:
        return known
    plain = replace(problem, epilogue=contract.Epilogue(gated=problem.epilogue.gated))
    operands = Operands(plain, watch.l2_bytes)
    graphs, names, left_out = [], [], {}
    for tactic in candidates:
        try:
            graphs.append(watch.graph(operands.candidate(prepare(plain, tactic, device))))
            names.append(tactic)
        except (MissingExtraError, UnsupportedError) as e:
            left_out[str(tactic)] = str(e)
    if not graphs:
        raise UnsupportedError(f"no tactic for {problem} can run here: {'; '.join(left_out.values())}")
    figures = watch.burst(graphs)
    for graph in graphs:
        graph.close()
    stable = {t: f.median_us for t, f in zip(names, figures, strict=True) if f.is_stable}
    left_out |= {str(t): f"unstable, spread {100 * f.spread:.0f} %" for t, f in zip(names, figures, strict=True) if not f.is_stable}
    if not stable:
        logger.warning("no tactic for %s was timed stably; the modelled one is used", problem)
        return replace(modelled(problem, num_sms(device)), left_out=left_out)
    best = min(stable, key=lambda t: stable[t])
    choice = Choice(best, {str(t): us for t, us in stable.items()}, left_out)
    _remember(path, choice)
    return choice


def _remembered_at(problem: Problem, candidates: Sequence[Tactic], watch: Stopwatch, folder: Path | None) -> Path:
    versions = installed(("nvmath-python", "nvidia-cublas", "nvidia-cusparselt-cu13"))
    key: dict[str, Any] = {"problem": asdict(problem), "machine": watch.meter.machine(), "sources": sources_digest(), "versions": versions}
    key["overlap"] = False
    key["candidates"] = [str(t) for t in candidates]
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    if folder is None:
        base = os.environ.get("TWOFOUR_CACHE_DIR") or os.path.join(
            os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "twofour"
        )
        folder = Path(base) / "tactics"
    return folder / f"{name}.json"


def _recall(path: Path, candidates: Sequence[Tactic]) -> Choice | None:
    try:
        stored = json.loads(path.read_text())
        times_us = {str(k): float(v) for k, v in stored["times_us"].items()}
        fastest = min(times_us, key=lambda name: times_us[name], default=None)
        tactic = next((t for t in candidates if str(t) == stored["tactic"]), None)
        if tactic is None or str(tactic) != fastest or not all(0 < us < inf for us in times_us.values()):
            raise ValueError("its tactic is not the fastest of those it timed")
        return Choice(tactic, times_us, dict(stored["left_out"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        logger.warning("tactic cache entry %s is damaged (%s) and is measured anew", path, e)
        return None


def _remember(path: Path, choice: Choice) -> None:
    text = json.dumps({"tactic": str(choice.tactic), "times_us": choice.times_us, "left_out": choice.left_out}, indent=1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    except (OSError, InputError) as e:
        reason = e.strerror if isinstance(e, OSError) else e
        raise InputError(f"cache folder {path.parent} cannot be written ({reason}); set TWOFOUR_CACHE_DIR to one that can") from e


def synchronize() -> None:
    """Wait for the GPU."""
    check(bindings().cuCtxSynchronize(), "waiting for the GPU")
