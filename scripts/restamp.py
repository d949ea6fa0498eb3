"""Prove that recorded kernels are unchanged machine code and stamp their rows: `python scripts/restamp.py OLD_SRC results/GPU/gemm.json`.

Rows of `twofour measure gemm` are stale once the family's device sources differ from those they were measured with. OLD_SRC is the `src`
folder of the revision that measured them (`git worktree add`). Every kernel of a row is compiled from both sources; only where each has the
same instructions, constants, relocations and registers, byte for byte, does the row get the digest of the present sources. Needs
pyelftools. Exit code 1 if any row stays stale.
"""

import argparse
import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from twofour.files import write_text
from twofour.jit.compiler import Compiled, compile_source
from twofour.kernels.gemm import Config, Problem
from twofour.kernels.gemm.source import source, sources_digest

SRC = Path(__file__).parents[1] / "src"


def kernels_of(row: dict[str, Any]) -> list[tuple[bool, str]]:
    """Return (sparse, tile) of our kernels in a row, from the names of its tactics."""
    found = []
    for name in row["tactics"].values():
        if name is not None and name.startswith("twofour:"):
            form, tile = name.removeprefix("twofour:").removesuffix(":split").rsplit(":", 1)
            found.append((form == "2:4", tile))
    return found


def code_of(built: Compiled) -> str:
    """Return the digest of what runs: instructions, constant bank, relocations, shared memory, registers; not the names of symbols."""
    from elftools.elf.elffile import ELFFile

    parts = hashlib.sha256(str(built.registers).encode())
    for section in ELFFile(io.BytesIO(built.cubin)).iter_sections():
        if section.name.startswith((".text.", ".nv.constant0.", ".rela.text.", ".nv.shared.")):
            parts.update(f"{section.name}:{section.data_size}:".encode() + section.data())
    return parts.hexdigest()


def codes(cases: list[list[Any]]) -> dict[str, str]:
    """Return the digest of each case's code, compiled from the sources that are imported here."""
    found = {}
    for dtype, sparse, tile in cases:
        problem = Problem(128, 128, 128, dtype=dtype, out_dtype=dtype, sparse=sparse)
        rows, tokens, stages, *buffers = tile.split("x")
        # Sources older than a choice know only what a config without it says.
        choice: dict[str, Any] = {"buffers": int(buffers[0])} if buffers else {}
        choice |= {"by_rows": True} if "+" in rows else {}
        built = compile_source(source(problem, Config("tuned", sum(map(int, rows.split("+"))), int(tokens), int(stages), **choice)))
        found[json.dumps([dtype, sparse, tile])] = code_of(built)
    return found


def compiled_by(src: Path, cases: list[list[Any]]) -> tuple[str, dict[str, str]]:
    """Return the digest of the sources in `src` and of each kernel compiled from them, by a process that imports them."""
    environment = {**os.environ, "PYTHONPATH": str(src.resolve())}
    done = subprocess.run(
        [sys.executable, __file__, "--compile"], env=environment, input=json.dumps(cases), capture_output=True, text=True, check=True
    )
    told = json.loads(done.stdout)
    return told["sources"], told["codes"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old_src", type=Path)
    parser.add_argument("results", type=Path)
    a = parser.parse_args()
    record = json.loads(a.results.read_text(encoding="utf-8"))
    rows = record["rows"]
    cases = sorted({(row["dtype"], *kernel) for row in rows for kernel in kernels_of(row)})
    old, before = compiled_by(a.old_src, [list(case) for case in cases])
    new, after = compiled_by(SRC, [list(case) for case in cases])
    same = {case for case in cases if before[json.dumps(list(case))] == after[json.dumps(list(case))]}
    stale = 0
    for row in rows:
        unchanged = row["sources_digest"] == old and all((row["dtype"], *kernel) in same for kernel in kernels_of(row))
        if unchanged:
            row["sources_digest"] = row["versions"]["ours"] = new
        stale += row["sources_digest"] != new
    if record["sources_digest"] == old and not stale:
        record["sources_digest"] = new
    write_text(a.results, json.dumps(record, indent=1) + "\n")
    print(f"{len(same)} of {len(cases)} kernels are the same machine code; {len(rows) - stale} of {len(rows)} rows are of {new}")  # noqa: T201
    return 1 if stale else 0


if __name__ == "__main__":
    if sys.argv[1:] == ["--compile"]:
        json.dump({"sources": sources_digest(), "codes": codes(json.load(sys.stdin))}, sys.stdout)
    else:
        raise SystemExit(main())
