"""`twofour measure gemm`: our 2:4 and dense kernels beside cuBLASLt and cuSPARSELt, one process, one protocol, one row a shape and dtype.

A run is cut into parts of at most `PART_S`: each finished row is written at once, and a later part goes on where the file ends.
"""

import json
import logging
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from twofour.builder.tactics.gemm import CUBLASLT_ALGORITHMS, Operands, Prepared, Tactic, prepare
from twofour.errors import InputError, MissingExtraError, UnsupportedError
from twofour.files import require_writable, write_text
from twofour.jit.driver import num_sms
from twofour.kernels.gemm import contract
from twofour.kernels.gemm.contract import Problem
from twofour.kernels.gemm.source import sources_digest
from twofour.timing.gpu import COMPARABLE, PROTOCOL, Graph, Stopwatch

logger = logging.getLogger(__name__)
SCHEMA = 1
PART_S = 8 * 60
DTYPES = ("bf16", "fp16")
# name: tokens, outputs, inputs. Square sizes, then layers of an 8-billion-parameter language model, BERT-large and ViT-huge.
SHAPES: dict[str, tuple[int, int, int]] = {
    "8192^3": (8192, 8192, 8192),
    "4096^3": (4096, 4096, 4096),
    "2048^3": (2048, 2048, 2048),
    **{
        f"8B.{layer} t{tokens}": (tokens, outputs, inputs)
        for tokens in (16, 64, 512, 2048, 8192)
        for layer, outputs, inputs in (("qkv", 6144, 4096), ("gateup", 28672, 4096), ("down", 4096, 14336))
    },
    "bertL.qkv 32x128": (4096, 3072, 1024),
    "bertL.ff1 32x128": (4096, 4096, 1024),
    "bertL.ff2 32x128": (4096, 1024, 4096),
    "vitH.ff1 64x257": (16448, 5120, 1280),
    "vitH.ff2 64x257": (16448, 1280, 5120),
}
ENERGY_FLOPS = 1e12  # energy is counted for products at least this large
SHAPE = re.compile(r"\s*([0-9]{1,18})\s*x\s*([0-9]{1,18})\s*x\s*([0-9]{1,18})\s*")
CONTENDERS = ("ours", "ours_dense", "cublas", "cusparselt")
ROW_KEYS = {"name", "dtype", "tokens", "out", "in", "sources_digest", "unstable", *(f"{contender}_us" for contender in CONTENDERS)}


def parse_shape(text: str) -> tuple[str, tuple[int, int, int]]:
    """Return (name, (tokens, outputs, inputs)) of `tokens x outputs x inputs`, like 512x6144x4096.

    Raises:
        InputError: it is not three positive integers, or not a product that the kernels take.
    """
    found = SHAPE.fullmatch(text.lower())
    if found is None:
        raise InputError(f"--shape {text!r} is not three positive integers tokens x outputs x inputs; write it like 512x6144x4096")
    tokens, outputs, inputs = (int(number) for number in found.groups())
    try:
        Problem(tokens, outputs, inputs)
    except InputError as e:
        raise InputError(f"--shape {text!r}: {e}") from e
    return text, (tokens, outputs, inputs)


# Of a contender's tactics, those this close behind its fastest in a burst, and at most so many, are compared sustained.
CLOSE, MOST_CLOSE = 1.06, 4
OURS_TIMED, DENSE_TIMED = 6, 3


class _Bench:
    """One row's contenders: the fastest tactic of each, then measured together."""

    def __init__(self, watch: Stopwatch, problem: Problem, sms: int) -> None:
        self.watch, self.problem, self.sms = watch, problem, sms
        self.operands = Operands(problem, watch.l2_bytes)
        self.notes: dict[str, str] = {}

    def _tactics(self, contender: str) -> list[Tactic]:
        if contender == "cusparselt":
            return [Tactic("cusparselt", True)]
        if contender == "cublas":
            return [Tactic("cublaslt", False, algorithm=i) for i in range(CUBLASLT_ALGORITHMS)]
        sparse = contender == "ours"
        found = contract.candidates(replace(self.problem, sparse=sparse), self.sms, OURS_TIMED if sparse else DENSE_TIMED)
        return [Tactic("twofour", sparse, config) for config in found]

    def _ready(self, contender: str) -> list[tuple[Prepared, Graph]]:
        """The contender's tactics that can run, each with its graph; a note where one cannot."""
        ready: list[tuple[Prepared, Graph]] = []
        for tactic in self._tactics(contender):
            try:
                prepared = prepare(self.problem, tactic, overlap=True)
                ready.append((prepared, self.watch.graph(self.operands.candidate(prepared))))
            except (InputError, MissingExtraError, UnsupportedError) as e:
                self.notes[str(tactic)] = str(e)
        return ready

    def chosen(self) -> dict[str, tuple[Prepared, Graph]]:
        """Each contender's fastest sustained tactic: the power limit ranks tiles in another order than a burst.

        All that are close in a burst run in one turn, so that each follows work like its own. One runs before them and does not count:
        whatever comes first finds the power controller still swinging.
        """
        ready = {contender: found for contender in CONTENDERS if (found := self._ready(contender))}
        owners = [(contender, i) for contender, found in ready.items() for i in range(len(found))]

        def graphs(of: Sequence[tuple[str, int]]) -> list[Graph]:
            return [ready[contender][i][1] for contender, i in of]

        burst = dict(zip(owners, (f.median_us for f in self.watch.burst(graphs(owners), rounds=5)), strict=True))
        close = [one for contender, found in ready.items() for one in close_behind(burst, contender, len(found))]
        figures = {}
        if len(close) > len(ready):
            figures = dict(zip(close, self.watch.sustained(graphs([close[-1], *close]), rounds=1)[1:], strict=True))
        best = {c: min((one for one in close if one[0] == c), key=lambda one: figures[one].median_us if figures else 0.0) for c in ready}
        for graph in graphs([one for one in owners if one not in best.values()]):
            graph.close()
        return {contender: ready[contender][i] for contender, (_, i) in best.items()}

    def row(self, with_energy: bool) -> dict[str, Any]:
        """Times in microseconds, their spread, TFLOP/s, clocks and powers of every contender."""
        chosen = self.chosen()
        graphs = [graph for _, graph in chosen.values()]
        burst = dict(zip(chosen, self.watch.burst(graphs), strict=True))
        sustained = dict(zip(chosen, self.watch.sustained(graphs), strict=True))
        row: dict[str, Any] = {"tactics": {c: str(p.tactic) for c, (p, _) in chosen.items()}}
        row["versions"] = {c: p.version for c, (p, _) in chosen.items()}
        for contender in CONTENDERS:
            figure = sustained.get(contender)
            row[f"{contender}_us"] = round(figure.median_us, 3) if figure else None
        row["spread"] = {c: round(f.spread, 4) for c, f in sustained.items()}
        row["burst_us"] = {c: round(f.median_us, 3) for c, f in burst.items()}
        row["burst_spread"] = {c: round(f.spread, 4) for c, f in burst.items()}
        row["n"] = {c: f.n for c, f in sustained.items()}
        row["clock_mhz"] = {c: round(f.clock_mhz) for c, f in sustained.items()}
        row["power_w"] = {c: round(f.power_w) for c, f in sustained.items()}
        row["tflops"] = {c: round(self.problem.flops / f.median_us / 1e6, 1) for c, f in sustained.items()}
        row["joules"] = self._energy(chosen) if with_energy else None
        row["protocol"] = PROTOCOL
        row["unstable"] = sorted(c for c, f in sustained.items() if not f.is_stable)
        row["notes"] = self.notes
        for graph in graphs:
            graph.close()
        return row

    def _energy(self, chosen: dict[str, tuple[Prepared, Graph]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for contender in ("ours", "cublas", "cusparselt"):
            if contender not in chosen:
                continue
            try:
                energy = self.watch.energy(chosen[contender][1])
            except UnsupportedError as e:
                self.notes[f"energy of {contender}"] = str(e)
                continue
            found[contender] = {
                "joules": round(energy.joules, 6),
                "pj_a_flop": round(energy.joules / self.problem.flops * 1e12, 4),
                "power_w": round(energy.power_w, 1),
                "window_s": round(energy.seconds, 2),
                "us": round(energy.us, 3),
            }
        return found


def close_behind(burst_us: Mapping[tuple[str, int], float], contender: str, count: int) -> list[tuple[str, int]]:
    """Return those of a contender's `count` tactics that are compared sustained, the fastest in a burst first."""
    own = sorted(((contender, i) for i in range(count)), key=lambda one: burst_us[one])
    return [one for one in own if burst_us[one] <= CLOSE * burst_us[own[0]]][:MOST_CLOSE]


def _load(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        stored = json.loads(path.read_text())
    except ValueError as e:
        raise InputError(f"{path} is not JSON ({e}), expected results written by `twofour measure gemm`; move it away") from e
    if not isinstance(stored, dict) or stored.get("schema") != SCHEMA or stored.get("kind") != "gemm":
        raise InputError(f"{path} holds no gemm results of schema {SCHEMA}; move it away")
    rows = stored.get("rows")
    if not isinstance(rows, list) or not all(isinstance(row, dict) and row.keys() >= ROW_KEYS for row in rows):
        raise InputError(f"{path}: its rows are damaged, expected those written by `twofour measure gemm`; move it away")
    return stored


def _save(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(results, indent=1) + "\n")


def machine(watch: Stopwatch) -> dict[str, Any]:
    """Return GPU, driver, power limit and the versions that matter to a row."""
    from importlib import metadata

    import torch

    found = watch.meter.machine()
    found["cuda"] = torch.version.cuda
    for package in ("torch", "cuda-core", "cuda-bindings", "nvidia-cuda-nvrtc", "nvmath-python", "nvidia-cublas", "nvidia-cusparselt-cu13"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def measure_gemm(
    out: Path,
    *,
    shapes: Sequence[str] = (),
    dtypes: Sequence[str] = DTYPES,
    energy: bool = True,
    part_s: float = PART_S,
    command: str = "twofour measure gemm",
) -> dict[str, Any]:
    """Measure and return the results, written to `out` row by row; stable rows of the same kernels and protocol are kept (`to_do`).

    Args:
        shapes: further `tokens x outputs x inputs`, beside the standard ones.
        energy: count joules for products of at least 1e12 FLOP, in windows of 5 s.
        part_s: stop after the row that passes this many seconds; call again to go on. `results["complete"]` tells.

    Raises:
        InputError: a shape cannot be read, or `out` holds something else or cannot be written.
    """
    import torch

    wanted = dict(SHAPES) | dict(parse_shape(text) for text in shapes)
    rows = _load(out).get("rows", [])
    watch = Stopwatch()
    # Asked before minutes of work, not after the first row.
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    require_writable(out)
    results = {
        "schema": SCHEMA,
        "kind": "gemm",
        "machine": machine(watch),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "sources_digest": sources_digest(),
        "complete": False,
        "rows": rows,
    }
    begin = time.perf_counter()
    for name, dtype in to_do(wanted, dtypes, rows):
        if time.perf_counter() - begin > part_s:
            _save(out, results)
            return results
        tokens, outputs, inputs = wanted[name]
        problem = Problem(tokens, outputs, inputs, dtype=dtype, out_dtype=dtype)
        head = {"name": name, "tokens": tokens, "out": outputs, "in": inputs, "dtype": dtype, "sources_digest": sources_digest()}
        row = head | _Bench(watch, problem, num_sms(0)).row(energy and problem.flops >= ENERGY_FLOPS)
        rows[:] = [r for r in rows if (r["name"], r["dtype"]) != (name, dtype)] + [row]
        _save(out, results)
        logger.info("%s %s: %s", name, dtype, row["tflops"])
        torch.cuda.empty_cache()
    results["complete"] = True
    _save(out, results)
    return results


def to_do(wanted: Mapping[str, tuple[int, int, int]], dtypes: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return the (name, dtype) still to be measured: absent, of changed kernels, by another protocol, or unstable; few tokens last.

    An old row stays in the file until its new one is there.
    """
    digest = sources_digest()
    good = {
        (r["name"], r["dtype"]) for r in rows if r["sources_digest"] == digest and r.get("protocol") in COMPARABLE and not r.get("unstable")
    }
    every = [(name, dtype) for dtype in dict.fromkeys(dtypes) for name in wanted if (name, dtype) not in good]
    return sorted(every, key=lambda one: wanted[one[0]][0] < 512)


def current_rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows with `stale` set: true where the family's device sources have changed since the row was measured."""
    digest = sources_digest()
    return [row | {"stale": row["sources_digest"] != digest} for row in results["rows"]]


def summary(results: dict[str, Any], dtype: str = "bf16") -> dict[str, float]:
    """Return geometric means and worst ratios of times, peer over ours, of the rows of `dtype` that are neither stale nor unstable."""
    rows = [r for r in current_rows(results) if r["dtype"] == dtype and not r["stale"]]
    found: dict[str, float] = {}

    def ratios(keep: Any, ours: str, peer: str) -> list[float]:
        pair = {ours.removesuffix("_us"), peer.removesuffix("_us")}
        return [r[peer] / r[ours] for r in rows if keep(r) and r[ours] and r[peer] and not pair & set(r["unstable"])]

    groups = {
        "sparse_over_cusparselt_2048": ratios(lambda r: r["tokens"] >= 2048, "ours_us", "cusparselt_us"),
        "sparse_over_cusparselt_512": ratios(lambda r: r["tokens"] == 512, "ours_us", "cusparselt_us"),
        "dense_over_cublas_2048": ratios(lambda r: r["tokens"] >= 2048, "ours_dense_us", "cublas_us"),
        "sparse_over_cublas_2048": ratios(lambda r: r["tokens"] >= 2048, "ours_us", "cublas_us"),
    }
    for name, values in groups.items():
        if values:
            product = 1.0
            for value in values:
                product *= value
            found[name] = product ** (1 / len(values))
            found[f"{name}_worst"] = min(values)
    return found
