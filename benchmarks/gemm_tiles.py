"""Tiles of the tuned 2:4 matrix product beside each other and cuSPARSELt: shared by tokens and shared by rows, on one Hopper GPU.

Each shape is computed by the configs the model puts first among tiles shared by tokens, by the tile of 128 x 256 shared by tokens, by tiles
of 128 x 256 shared by rows, and by cuSPARSELt after its own search; all in one process, interleaved, by the protocol of `timing/gpu.py`.
Before it is timed, a config's result is compared with the first one's. Prints a line a contender: burst and sustained microseconds, their
spread, clock, power, and how much faster than cuSPARSELt it is when sustained. `--json FILE` writes all.

    python benchmarks/gemm_tiles.py [--dtype fp16] [--shape 2048^3] [--json FILE]
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from twofour.builder.tactics.gemm import Operands, Prepared, Tactic, prepare
from twofour.errors import MissingExtraError, UnsupportedError
from twofour.jit.driver import num_sms
from twofour.kernels.gemm.contract import Config, Problem, candidates, derive, fitting_stages, most_stages, shared_by_rows, why_not
from twofour.report.gemm import SHAPES
from twofour.timing.gpu import Figure, Stopwatch

NAMES = ("8B.qkv t512", "8B.gateup t512", "8B.down t512", "2048^3", "bertL.ff1 32x128", "bertL.ff2 32x128", "8B.down t2048")
BY_TOKENS = 3  # of the modelled best


def say(text: str) -> None:
    """Print a line at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def split_where_cut(problem: Problem, config: Config, sms: int) -> Config:
    """The config, split where that cuts its tiles."""
    split = replace(config, split=True)
    return split if derive(problem, split, sms).split_blocks else replace(config, split=False)


def configs(problem: Problem, sms: int) -> list[Config]:
    """Tiles shared by tokens, the modelled best first; then those shared by rows, with four stages and with buffers for all outputs."""
    by_tokens = [config for config in candidates(problem, sms) if not config.by_rows][:BY_TOKENS]
    plain = split_where_cut(problem, Config("tuned", 128, 256, most_stages(problem, 128, 256)), sms)
    deep = shared_by_rows(problem, 256)
    roomy = replace(deep, buffers=4)
    roomy = replace(roomy, stages=fitting_stages(problem, roomy))
    modelled = [config for config in candidates(problem, sms) if config.by_rows]
    by_rows = [split_where_cut(problem, config, sms) for config in (deep, roomy)]
    found = [*by_tokens, plain, *modelled, *by_rows]
    return [config for config in dict.fromkeys(found) if why_not(problem, config) is None]


def check(operands: Operands, ready: Sequence[Prepared], stream: int) -> None:
    """Compare what the tactics compute of the first operand set: each sum of fp32 products rounds differently, then once to 16 bits."""
    results = []
    for prepared in ready:
        adopted = prepared.adopt(operands.weight[0])
        operands.d[0].fill_(float("nan"))
        torch.cuda.synchronize()
        prepared.call(operands.x[0].data_ptr(), prepared.address(adopted), operands.d[0].data_ptr(), stream)
        torch.cuda.synchronize()
        results.append(operands.d[0].float())
    eps = torch.finfo(operands.d[0].dtype).eps
    for prepared, found in zip(ready[1:], results[1:], strict=True):
        largest = float(results[0].abs().max())
        if not torch.allclose(found, results[0], rtol=2 * eps, atol=eps * largest / 16):
            raise SystemExit(f"{prepared.tactic} computes something else than {ready[0].tactic}")


def measure(watch: Stopwatch, name: str, dtype: str) -> list[dict[str, Any]]:
    """One shape's contenders: name, burst and sustained figures."""
    problem, sms = Problem(*SHAPES[name], dtype=dtype, out_dtype=dtype), num_sms(0)
    operands = Operands(problem, watch.l2_bytes)
    ready = [prepare(problem, Tactic("twofour", True, config), overlap=True) for config in configs(problem, sms)]
    check(operands, ready, int(watch.stream))
    try:
        ready.append(prepare(problem, Tactic("cusparselt", True)))
    except (MissingExtraError, UnsupportedError) as e:
        say(f"{name} {dtype}: without cuSPARSELt, {e}")
    graphs = [watch.graph(operands.candidate(prepared)) for prepared in ready]
    burst, sustained = watch.burst(graphs), watch.sustained(graphs)
    for graph in graphs:
        graph.close()
    names = [str(prepared.tactic) for prepared in ready]
    peer = sustained[names.index("cusparselt")].median_us if "cusparselt" in names else None
    rows = []
    for tactic, fast, settled in zip(names, burst, sustained, strict=True):
        rows.append({"name": name, "dtype": dtype, "tactic": tactic, "burst": asdict(fast), "sustained": asdict(settled)})
        say(line(f"{name} {dtype}", tactic, fast, settled, problem.flops, peer))
    return rows


def line(head: str, tactic: str, fast: Figure, settled: Figure, flops: int, peer: float | None) -> str:
    """What is printed of a contender."""
    over = f" {peer / settled.median_us:.3f} x cuSPARSELt" if peer else ""
    unstable = "" if settled.is_stable else " UNSTABLE"
    rates = [f"{flops / figure.median_us / 1e6:5.0f} TFLOP/s" for figure in (fast, settled)]
    return f"{head:24} {tactic:34} burst {fast} {rates[0]}  sustained {settled} {rates[1]}{over}{unstable}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=["fp16", "bf16"], action="append")
    parser.add_argument("--shape", choices=sorted(SHAPES), action="append")
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    watch, rows = Stopwatch(), []
    for dtype in a.dtype or ["fp16", "bf16"]:
        for name in a.shape or NAMES:
            rows += measure(watch, name, dtype)
            torch.cuda.empty_cache()
            if a.json:
                a.json.write_text(json.dumps({"machine": watch.meter.machine(), "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
