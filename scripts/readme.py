"""Writes the tables in README.md, docs/engine.md and docs/training.md from results/: `python scripts/readme.py [runs/demo/report.json]`.

With a report it first records its accuracy in results/cpu/accuracy-demo.json. Rows whose sources have changed since are left out.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, geometric_mean, stdev
from typing import Any

from pages import filled

from twofour.files import write_text
from twofour.kernels.launchable import sources_digests
from twofour.report import Report
from twofour.report.gemm import current_rows
from twofour.timing.gpu import COMPARABLE

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "evidence"))
import engine_rows  # noqa: E402

DEMO = ROOT / "results" / "cpu" / "accuracy-demo.json"
ONESHOT = DEMO.with_name("accuracy-oneshot.json")
GEMM = ROOT / "results" / "nvidia-h200" / "gemm.json"
ENGINE = ROOT / "results" / "nvidia-h200" / "engine.json"
MAIN_JOB = ENGINE.with_name("main-job.json")
AGREEMENT, SOAK = ENGINE.with_name("engine-agreement.json"), ENGINE.with_name("engine-soak.json")
TOKENS = {"512 tokens": lambda n: n == 512, "2,048 tokens and more": lambda n: n >= 2048}


def read(path: Path) -> dict[str, Any]:
    """Return a results file."""
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value


def record(report: Report) -> None:
    """Keep the accuracy of a run, a row a seed and variant, with where it was measured."""
    rows = [
        {"net": report.model, "data": report.data, "seed": seed, "variant": row.variant, "metric": report.metric, "value": value}
        for row in report.accuracy
        for seed, value in zip(report.seeds, row.values, strict=True)
    ]
    head = {"schema": 1, "kind": "accuracy", "machine": report.environment.model_dump(), "date": report.created, "command": report.command}
    write_text(DEMO, json.dumps({**head, "rows": rows}, indent=1, ensure_ascii=False) + "\n")


def demo_table() -> str:
    """Return the accuracy of `make demo` as Markdown."""
    recorded = read(DEMO)
    by_variant: dict[str, list[float]] = {}
    for row in recorded["rows"]:
        by_variant.setdefault(row["variant"], []).append(row["value"])
    lines = ["| | accuracy on 360 held-out digits, % |", "|---|---|"]
    for variant, values in by_variant.items():
        lines.append(f"| {variant} | {fmean(values):.2f}" + (f" ± {stdev(values):.2f} |" if len(values) > 1 else " |"))
    machine, seeds = recorded["machine"], len(next(iter(by_variant.values())))
    where = f"{machine['cpu']}, {machine['cores']} cores, torch {machine['libraries']['torch']}, Python {machine['python']}"
    lines += ["", f"Mean ± standard deviation over {seeds} seeds; {where}; {recorded['date'][:10]}."]
    return "\n".join(lines)


def gemm_table() -> str:
    """Return our kernels beside the libraries as Markdown, or a sentence when no recorded row is of these kernels, timed by
    today's protocol."""
    recorded = read(GEMM) if GEMM.is_file() else {"rows": []}
    rows = [row for row in current_rows(recorded) if not row["stale"] and row.get("protocol") in COMPARABLE]
    if not rows:
        return "No measurement of the present kernels is recorded."
    lines = ["| sustained, geometric means | dtype | shapes | 2:4 over cuSPARSELt | worst | 2:4 over cuBLASLt | our dense over cuBLASLt |"]
    lines.append("|---|---|---|---|---|---|---|")
    for label, keep in TOKENS.items():
        for dtype in ("bf16", "fp16"):
            chosen = [row for row in rows if row["dtype"] == dtype and keep(row["tokens"])]
            if not chosen:
                continue
            pairs = (("cusparselt_us", "ours_us"), ("cublas_us", "ours_us"), ("cublas_us", "ours_dense_us"))
            sparse, dense, own = ([row[peer] / row[us] for row in chosen if row[peer] and row[us]] for peer, us in pairs)
            worst = f"{min(sparse):.2f}" if sparse else "–"
            means = [f"{geometric_mean(values):.2f}" if values else "–" for values in (sparse, dense, own)]
            lines.append(f"| {label} | {dtype} | {len(chosen)} | **{means[0]}** | {worst} | {means[1]} | {means[2]} |")
    machine = recorded["machine"]
    known = ("gpu", "driver", "power_limit_w", "cuda", "torch", "nvidia-cublas", "nvidia-cusparselt-cu13")
    where = ", ".join(f"{name} {machine[name]}" for name in known if machine.get(name) is not None)
    lines += [
        "",
        f"{where}; {recorded['date'][:10]}; `{recorded['command']}`; every row: [results/nvidia-h200/gemm.json]({GEMM.relative_to(ROOT)}).",
    ]
    return "\n".join(lines)


def engine_table() -> str:
    """Return whole networks, dense and 2:4, beside torch.compile, as Markdown; a sentence when none is recorded of these kernels."""
    return engine_rows.short_table(engine_rows.read(ENGINE), sources_digests())


def engine_page_table() -> str:
    """Return every recorded row of whole networks as Markdown."""
    return engine_rows.full_table(engine_rows.read(ENGINE), sources_digests())


def agreement_table() -> str:
    """Return how often engines and torch in float32 predict the same, as Markdown; a sentence when these kernels were not compared."""
    recorded = read(AGREEMENT) if AGREEMENT.is_file() else {"rows": [], "sources_digests": None}
    if recorded["sources_digests"] != sources_digests():
        return "No comparison of the present kernels is recorded."
    found = {(row["net"], row["variant"], row["precision"]): row for row in recorded["rows"]}
    kinds = list(dict.fromkeys((variant, precision) for _, variant, precision in found))
    lines = [
        "| network | torch fp32, % right: dense, 2:4 | " + " | ".join(f"{variant}, {precision}" for variant, precision in kinds) + " |"
    ]
    lines.append("|---" * (2 + len(kinds)) + "|")
    for net in dict.fromkeys(net for net, _, _ in found):
        rows = [found.get((net, *kind)) for kind in kinds]
        cells = [f"{row['agreement_percent']:.2f} %" if row else "–" for row in rows]
        right = ", ".join(dict.fromkeys(f"{row['torch_fp32_percent']:.2f}" for row in rows if row))
        lines.append(f"| {net} | {right} | {' | '.join(cells)} |")
    images = ", ".join(dict.fromkeys(f"{row['images']:,}" for row in recorded["rows"]))
    where = f"{recorded['machine']['gpu']}, torch {recorded['machine']['torch']}; {recorded['date'][:10]}; `{recorded['command']}`"
    return "\n".join([*lines, "", f"{images} images each; {where}."])


def soak_line() -> str:
    """Return what the soak found, or a sentence when these kernels did not run it."""
    recorded = read(SOAK) if SOAK.is_file() else {"sources": None}
    if recorded["sources"] != sources_digests():
        return "No soak of the present kernels is recorded."
    parts = recorded["rows"]
    gpu, host = (max(part["growth"][name] for part in parts) for name in ("gpu_bytes", "host_bytes"))
    wrong = sum(len(part["wrong"]) for part in parts)
    batches, alike = recorded["batches"].replace(",", ", "), "none" if recorded["results_alike"] else "some"
    return (
        f"{recorded['minutes']:.1f} minutes in {len(parts)} processes, {recorded['calls']:,} calls by {recorded['threads']} threads with"
        f" batches of {batches}: {wrong} results differ, between processes {alike}; largest growth of a process {gpu:,} bytes on the GPU,"
        f" {host / 1e6:.1f} MB on the host. {recorded['machine']['gpu']}; {recorded['date'][:10]}; `{recorded['command']}`."
    )


def main_job_table() -> str:
    """Return what `compress` reported on a GPU as Markdown: what the engine ran on, checks, accuracy."""
    recorded = read(MAIN_JOB)
    lines = ["| command | engine | checks passed | 2:4, dense with the same training, % |", "|---" * 4 + "|"]
    for row in recorded["rows"]:
        failed = [name for name, passed in row["checks"].items() if not passed]
        passed = f"{len(row['checks']) - len(failed)} of {len(row['checks'])}" + f" (not: {', '.join(failed)})" * bool(failed)
        accuracy = ", ".join(f"{row['accuracy'][variant]:.1f}" for variant in ("2:4", "dense + same training"))
        engine = f"{row['backend']}, {'with' if row['sparse_kernels'] else 'without'} sparse kernels"
        lines.append(f"| `{row['command']}` | {engine} | {passed} | {accuracy} |")
    return "\n".join([*lines, "", f"{recorded['machine']['gpu']}; {recorded['date'][:10]}; `{recorded['command']}`."])


def oneshot_table() -> str:
    """Return what pruning by magnitude alone costs, batch-norm as it was and re-estimated, as Markdown."""
    values = {(row["net"], row["variant"]): row["value"] for row in read(ONESHOT)["rows"]}
    variants = ("dense", "2:4 one-shot", "2:4 one-shot, batch-norm re-estimated")
    lines = ["| network | dense | 2:4 one-shot | with `calibration` |", "|---|---|---|---|"]
    for net in dict.fromkeys(net for net, _ in values):
        lines.append(f"| {net} | {' | '.join(f'{values[net, variant]:.2f} %' for variant in variants)} |")
    return "\n".join(lines)


TABLES: dict[str, Callable[[], str]] = {"demo": demo_table, "gemm": gemm_table, "engine": engine_table}
PAGE_TABLES: dict[str, Callable[[], str]] = {
    "engine": engine_page_table,
    "agreement": agreement_table,
    "soak": soak_line,
    "main job": main_job_table,
}
TRAINING_TABLES: dict[str, Callable[[], str]] = {"one-shot": oneshot_table}


def main() -> None:
    """Record a report if one is given, then write the tables."""
    if len(sys.argv) > 1:
        record(Report.load(sys.argv[1]))
    docs = ROOT / "docs"
    for path, tables in ((ROOT / "README.md", TABLES), (docs / "engine.md", PAGE_TABLES), (docs / "training.md", TRAINING_TABLES)):
        write_text(path, filled(path.read_text(encoding="utf-8"), tables))


if __name__ == "__main__":
    main()
