"""Which of our kernels two revisions of the sources compile to the same machine code.

A case is a kernel as plain JSON: [family, problem, config]. Each revision's own package lists, states and compiles its kernels in
processes that import it. What a text compiles to is kept in a folder, so that none is compiled twice and a run that was stopped goes on.
Needs NVRTC, no GPU.
"""

import hashlib
import inspect
import json
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

Case = list[Any]
EVERY = 1 << 20  # more configs than a problem has
SHARE = 32  # kernels that a process compiles
SAID_S = 10.0
TABLE, SCALAR_BYTES = ".nv.constant4", 8  # the addresses of constants in memory
NO_BITS = 8  # a section that the file does not hold


@dataclass(frozen=True)
class Section:
    """A section of a 64-bit ELF file; `data` is empty where the file holds none."""

    name: str
    data: bytes
    size: int


def sections_of(elf: bytes) -> list[Section]:
    """Return an ELF file's sections by number. Source: System V ABI, "Object Files", the 64-bit structures."""
    (begin,) = struct.unpack_from("<Q", elf, 0x28)
    size, number, names = struct.unpack_from("<3H", elf, 0x3A)
    headers = [struct.unpack_from("<2I4Q2I2Q", elf, begin + i * size) for i in range(number)]
    texts = headers[names][4]
    found = []
    for name, kind, _, _, offset, length, *_ in headers:
        text = elf[texts + name : elf.index(b"\0", texts + name)].decode()
        found.append(Section(text, b"" if kind == NO_BITS else elf[offset : offset + length], length))
    return found


def code_of(cubin: bytes, registers: int) -> str:
    """Return the digest of what runs: instructions, constants, relocations, shared memory, registers; not the names of symbols.

    The compiler keeps a copy of every constant in memory, with a table of their addresses, also of those that nothing reads from there.
    Scalars are part of the instructions; what is larger counts with its place in the table.
    """
    parts = hashlib.sha256(str(registers).encode())
    sections = sections_of(cubin)
    for section in sections:
        if section.name.startswith((".text.", ".nv.constant", ".rela.text.", ".nv.shared.")) and section.name != TABLE:
            parts.update(f"{section.name}:{section.size}:".encode() + section.data)
    by_name = {section.name: section.data for section in sections}
    symbols = list(struct.iter_unpack("<I2BH2Q", by_name[".symtab"]))
    for offset, info, addend in struct.iter_unpack("<QQq", by_name.get(f".rela{TABLE}", b"")):
        *_, section, begin, size = symbols[info >> 32]
        if size > SCALAR_BYTES:
            parts.update(f"{offset}:{addend}:{size}:".encode() + sections[section].data[begin : begin + size])
    return parts.hexdigest()


def digests(_request: Any) -> dict[str, str]:
    """Return the digest of each family's device sources."""
    from twofour.kernels.launchable import sources_digests

    return sources_digests()


def listed(request: dict[str, Any]) -> list[dict[str, Any]]:
    """Return for each network how many layers it has, how many of them 2:4 could help, and the cases an engine of it may hold.

    That is whatever a build times, and of each of these problems every config that is offered; of products every legal one, since which are
    timed follows from a model of their speed that another revision may not share. With `sparse` each layer counts as 2:4 that can be.
    """
    from twofour.builder.lower import Front

    found, fronts = [], {path: Front(path) for path in {graph["path"] for graph in request["graphs"]}}
    for graph in request["graphs"]:
        lowered = fronts[graph["path"]].lower(graph["batch"], graph["precision"])
        calls = [call for call in lowered.calls if call.family != "fallback"]
        cases: dict[str, Case] = {}
        for call in calls:
            for case in cases_of(call, graph["sparse"], request["sms"]):
                cases[json.dumps(case)] = case
        eligible = sum(call.eligible for call in calls)
        found.append({"layers": len(lowered.calls), "eligible": eligible, "cases": list(cases.values())})
    return found


def cases_of(call: Any, sparse: bool, sms: int) -> Iterable[Case]:
    """Yield the cases of one layer."""
    from twofour.builder.tactics.ways import ways_of
    from twofour.kernels.families import OURS, family
    from twofour.kernels.records import to_plain

    ways, _ = ways_of(replace(call, is_24=call.eligible), sms=sms) if sparse else ways_of(call, sparsity="off", sms=sms)
    steps = [step for way in ways for step in (way, way.after) if step is not None and step.library == OURS]
    for name, problem in dict.fromkeys((step.family, step.problem) for step in steps):
        configs = family(name).candidates(problem, sms, **({"limit": EVERY} if name == "gemm" else {}))
        timed = [step.config for step in steps if (step.family, step.problem) == (name, problem)]
        for config in dict.fromkeys([*configs, *timed]):
            yield [name, to_plain(problem), to_plain(config)]


def source_of(case: Case, sms: int) -> Any:
    """Return the `Source` of a case.

    Raises:
        InputError: these sources have no such kernel.
    """
    from twofour.kernels.families import read_config, read_problem
    from twofour.kernels.launchable import kernel_source

    family, problem, config = case
    return kernel_source(family, read_problem(family, problem, "problem"), read_config(family, config, "config"), sms)


def key_of(source: Any) -> str:
    """Return what decides a kernel's code: its text, the compiler and how it is called, and what counts as code."""
    from twofour.jit import compiler

    how = (inspect.getsource(code_of), inspect.getsource(compiler), compiler.compiler_version())
    return hashlib.sha256("\0".join([*how, source.name, source.text]).encode()).hexdigest()


def keys(request: dict[str, Any]) -> list[str]:
    """Return each case's key; where these sources have no such kernel, the reason behind a `!`."""
    from twofour.errors import InputError

    found = []
    for case in request["cases"]:
        try:
            found.append(key_of(source_of(case, request["sms"])))
        except InputError as error:
            found.append(f"!{error}")
    return found


def compiled(request: dict[str, Any]) -> None:
    """Write into the folder what each case compiles to, and print a line for each that is done."""
    from twofour.errors import UnsupportedError
    from twofour.jit.compiler import compile_source

    for case in request["cases"]:
        source = source_of(case, request["sms"])
        try:
            built = compile_source(source)
            code = code_of(built.cubin, built.registers)
        except UnsupportedError as error:
            code = f"!{error}"
        path = Path(request["folder"]) / key_of(source)
        aside = path.with_name(f".{os.getpid()}.{path.name}")
        aside.write_text(code, encoding="utf-8")
        aside.replace(path)
        sys.stdout.write(f"{path.name}\n")
        sys.stdout.flush()


TASKS: dict[str, Callable[[Any], Any]] = {task.__name__: task for task in (digests, listed, keys)}


def answer() -> None:
    """Do what standard input asks for: the body of the process."""
    import twofour

    request = json.load(sys.stdin)
    src, here = Path(request["src"]), Path(twofour.__file__).resolve()
    if src not in here.parents:
        raise SystemExit(f"twofour was imported from {here}, expected from {src}")
    if request["task"] == "compiled":
        compiled(request)
    else:
        json.dump(TASKS[request["task"]](request), sys.stdout)


@dataclass(frozen=True)
class Tree:
    """A revision's `src` folder, whose package answers in a process of its own."""

    src: Path

    def _process(self, task: str, request: Mapping[str, Any]) -> "subprocess.Popen[str]":
        src = str(self.src.resolve())
        environment = {**os.environ, "PYTHONPATH": src, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [sys.executable, __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
        )
        assert process.stdin is not None
        process.stdin.write(json.dumps({"task": task, "src": src, **request}))
        process.stdin.close()
        return process

    def lines(self, task: str, **request: Any) -> Iterable[str]:
        """Yield the lines of the answer as they come.

        Raises:
            RuntimeError: the process failed; what it said is on standard error.
        """
        process = self._process(task, request)
        assert process.stdout is not None
        try:
            yield from process.stdout
        finally:
            process.stdout.close()
            code = process.wait()
        if code:
            raise RuntimeError(f"{task} by the sources in {str(self.src)!r} ended with exit code {code}")

    def ask(self, task: str, **request: Any) -> Any:
        """Return the answer.

        Raises:
            RuntimeError: as `lines`.
        """
        return json.loads("".join(self.lines(task, **request)))


class Progress:
    """Says how many kernels are compiled and how long the others will take, now and then."""

    def __init__(self, total: int, say: Callable[[str], None]) -> None:
        self.total, self.say = total, say
        self.done, self.begin = 0, time.monotonic()
        self._said, self._lock = self.begin, threading.Lock()

    def step(self) -> None:
        """Count a kernel; threads may do so at once."""
        with self._lock:
            self.done += 1
            now = time.monotonic()
            if now - self._said >= SAID_S or self.done == self.total:
                self._said = now
                left = (now - self.begin) / self.done * (self.total - self.done)
                self.say(f"[{now - self.begin:5.0f} s] {self.done} of {self.total} kernels compiled, about {left:.0f} s left")


def changed(
    old: Tree, new: Tree, cases: Sequence[Case], *, sms: int, folder: Path, jobs: int, say: Callable[[str], None]
) -> dict[str, tuple[str, str]]:
    """Return the cases, as JSON text, that are not the same machine code from both trees, each with its kernel's key and why.

    Args:
        sms: multiprocessors of the GPU. folder: where codes are kept. jobs: processes that compile at once.
    """
    before, after = (tree.ask("keys", cases=list(cases), sms=sms) if cases else [] for tree in (old, new))
    folder.mkdir(parents=True, exist_ok=True)
    missing: list[dict[str, Case]] = [{}, {}]
    for case, pair in zip(cases, zip(before, after, strict=True), strict=True):
        if pair[0] != pair[1] and not any(key.startswith("!") for key in pair):
            for found, key in zip(missing, pair, strict=True):
                if not (folder / key).is_file():
                    found[key] = case
    kernels = len({pair for pair in zip(before, after, strict=True) if pair[0] != pair[1]})
    say(f"{len(set(before))} kernels of {len(cases)} cases; {kernels} have another text, {sum(map(len, missing))} texts are to be compiled")
    _compile(list(zip((old, new), missing, strict=True)), sms, folder, jobs, say)
    found = {}
    for case, one, other in zip(cases, before, after, strict=True):
        why = _why_changed(one, other, folder)
        if why:
            found[json.dumps(case)] = one, why
    return found


def _compile(todo: Sequence[tuple[Tree, dict[str, Case]]], sms: int, folder: Path, jobs: int, say: Callable[[str], None]) -> None:
    """Compile what is missing from each tree, several at once."""
    parts = []
    for tree, missing in todo:
        each = list(missing.values())
        parts += [(tree, each[first : first + SHARE]) for first in range(0, len(each), SHARE)]
    progress = Progress(sum(len(part) for _, part in parts), say)

    def work(tree: Tree, part: list[Case]) -> None:
        for _ in tree.lines("compiled", cases=part, sms=sms, folder=str(folder.resolve())):
            progress.step()

    pool = ThreadPoolExecutor(jobs)
    try:
        for one in [pool.submit(work, *part) for part in parts]:
            one.result()
    finally:
        # Where one failed or the user stopped, what has not begun does not begin.
        pool.shutdown(cancel_futures=True)


def _why_changed(before: str, after: str, folder: Path) -> str:
    """Return why a kernel is not known to be the same code; empty where it is."""
    for whose, key in (("old", before), ("new", after)):
        if key.startswith("!"):
            return f"the {whose} sources have no such kernel: {key[1:]}"
    if before == after:
        return ""
    codes = [(folder / key).read_text(encoding="utf-8") for key in (before, after)]
    for whose, code in zip(("old", "new"), codes, strict=True):
        if code.startswith("!"):
            return f"the {whose} sources do not compile: {code[1:]}"
    return "" if codes[0] == codes[1] else "other machine code"


if __name__ == "__main__":
    answer()
