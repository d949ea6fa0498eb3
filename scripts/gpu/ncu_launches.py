"""Launches our best 2:4 kernel and cuSPARSELt's twice each where a profiler looks: `python scripts/gpu/ncu_launches.py DTYPE SHAPE…`.

Shapes by their names in `twofour.report.gemm.SHAPES`.
"""

import sys
from typing import Any

import torch

from twofour.jit.driver import num_sms
from twofour.kernels.gemm.contract import Problem
from twofour.report.gemm import SHAPES, _Bench
from twofour.timing.gpu import Stopwatch

LAUNCHES = 2


def launch(candidate: Any, watch: Stopwatch) -> None:
    """Launch a few times and wait."""
    for number in range(LAUNCHES):
        candidate.enqueue(number, int(watch.stream))
    watch.synchronize()


def main() -> None:
    dtype, names = sys.argv[1], sys.argv[2:]
    watch = Stopwatch()
    for name in names:
        tokens, outputs, inputs = SHAPES[name]
        bench = _Bench(watch, Problem(tokens, outputs, inputs, dtype=dtype, out_dtype=dtype), num_sms(0))
        for contender in ("ours", "cusparselt"):
            best = bench.best(contender)
            if best is None:
                sys.stdout.write(f"{name} {dtype} {contender}: {bench.notes}\n")
                continue
            prepared, graph = best
            candidate = bench.operands.candidate(prepared)
            launch(candidate, watch)
            sys.stdout.write(f"{name} {dtype} {contender}: {prepared.tactic}\n")
            torch.cuda.profiler.start()
            launch(candidate, watch)
            torch.cuda.profiler.stop()
            graph.close()
        del bench
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
