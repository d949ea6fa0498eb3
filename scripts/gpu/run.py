"""Tests and measures on a machine with Hopper GPUs, in blocks that can be stopped and gone on with.

    scripts/gpu.sh PART… [--out runs/gpu] [--gpus 0,1] [--seconds 570] [--wheels DIR] [--data DIR …] [--tar FILE] [--again] [--list]
    scripts/gpu.sh --block 1 …

PART is a part, a group of parts, or `all`; `--list` prints them with the seconds expected, and what a block begins when.

The code is copied first, so that a checkout may change meanwhile; so is the data of `--data`, folder by folder, beside what earlier calls
brought. `--wheels` is a folder of wheels for a machine without a registry: they are installed into a folder of their own. Results begin
as the checkout's and lie in OUT/results, what else is worth keeping in OUT/kept, logs in OUT/logs, and OUT/outcomes.tsv has a line a part.
All of these are packed into `--tar` (OUT.tgz) every 15 s, files above 16 MB left out; unpacked as OUT on another machine, they let it go
on there.

A part that passed is not run again while the code is the same, unless `--again`. schedule.py has the rules by which parts run beside each
other. Exit code 1: a part failed or did not come to its end; 2: the call is wrong.
"""

import argparse
import contextlib
import hashlib
import io
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from parts import BLOCKS, BY_NAME, GROUPS, PARTS, ROOT, Part, chosen
from schedule import Place, Schedule, predicted

PACKED = ("results", "kept", "logs", "outcomes.tsv")
PACK_EVERY_S, LARGEST_BYTES, GRACE_S = 15.0, 16 << 20, 15.0
LISTED_CORES = 32
DIGESTED = ("src", "tests", "benchmarks", "evidence")
# Where CUDA's tools lie when they are not on the PATH.
TOOLS = ("usr/local/cuda*/bin", "opt/nvidia/nsight-compute/*", "opt/nvidia/*/compute-sanitizer")


def say(text: str) -> None:
    """Print a line at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def refuse(text: str) -> NoReturn:
    """Say why this call cannot be served, and end."""
    sys.stderr.write(f"gpu: {text}\n")
    sys.exit(2)


def digest_of(root: Path, folders: Iterable[str] = DIGESTED) -> str:
    """Return a digest of the code that parts run."""
    found = hashlib.sha256()
    for folder in folders:
        for path in sorted(path for path in (root / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts):
            found.update(f"{path.relative_to(root)}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()[:12]


def copy_tree(to: Path, out: Path, *, results: bool) -> Path:
    """Copy the project to a folder and return it; `results`: as recorded, not those of the output folder."""
    if not to.exists():
        aside = to.with_name(f".{to.name}.{os.getpid()}")
        left_out = shutil.ignore_patterns("__pycache__", "*.pyc", "*.egg-info")
        aside.mkdir(parents=True)
        for path in ROOT.iterdir():
            if path.name.startswith(".") or path.name in ("runs", "demo") or out.is_relative_to(path):
                continue
            if path.name == "results" and not results:
                continue
            if path.is_dir():
                shutil.copytree(path, aside / path.name, ignore=left_out)
            else:
                shutil.copy2(path, aside / path.name)
        for name in ("kept",) if results else ("kept", "results", "runs"):
            (aside / name).symlink_to(out / name)
        aside.rename(to)
    return to


def merge(source: Path, to: Path) -> None:
    """Copy the files of a folder that are not there yet."""
    for path in source.rglob("*"):
        there = to / path.relative_to(source)
        if path.is_file() and not there.exists():
            there.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, there)


def install(wheels: Path, site: Path) -> None:
    """Install the wheels of a folder into `site`, once."""
    files = sorted(wheels.glob("*.whl"))
    mark, names = site / ".installed", "\n".join(path.name for path in files)
    if not files or (mark.exists() and mark.read_text() == names):
        return
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--upgrade"]
    if subprocess.run([*command, "--target", str(site), *map(str, files)], check=False).returncode:
        refuse(f"the wheels in {str(wheels)!r} cannot be installed, expected wheels for this Python; pip's reason is above")
    mark.write_text(names)


def pack(out: Path, to: Path) -> None:
    """Pack what is to be kept; a file is read whole first, because it may grow meanwhile."""
    aside = to.with_name(f".{to.name}")
    with tarfile.open(aside, "w:gz", compresslevel=1) as tar:
        for path in sorted(path for name in PACKED for path in ((out / name).rglob("*") if (out / name).is_dir() else [out / name])):
            with contextlib.suppress(OSError):
                if path.is_file() and path.stat().st_size <= LARGEST_BYTES:
                    data, entry = path.read_bytes(), tarfile.TarInfo(str(path.relative_to(out)))
                    entry.size, entry.mtime = len(data), int(path.stat().st_mtime)
                    tar.addfile(entry, io.BytesIO(data))
    aside.replace(to)


def gpu_name() -> str:
    """Return the name of the machine's folder of results."""
    asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        told = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        refuse(f"`nvidia-smi` names no GPU ({error}), expected a machine with one; `--list` works anywhere")
    return told.splitlines()[0].strip().lower().replace(" ", "-")


@dataclass
class Running:
    """A part that runs."""

    part: Part
    place: Place
    process: subprocess.Popen[bytes]
    began: float
    limit: float
    told: float | None = None

    def stop(self) -> None:
        """Ask it to stop as ^C does, and end it with all it started if it does not."""
        if self.told is None:
            self.told = time.monotonic()
            self._signal(signal.SIGINT)
        elif time.monotonic() - self.told > GRACE_S:
            self.kill()

    def kill(self) -> None:
        """End it with all it started."""
        self._signal(signal.SIGKILL)

    def _signal(self, what: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, what)


class Runner:
    """Runs parts in the folders of one output folder."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.out: Path = options.out.resolve()
        self.tar: Path = options.tar.resolve() if options.tar else self.out.with_name(f"{self.out.name}.tgz")
        self.wheels = options.wheels.resolve() if options.wheels else None
        self.gpu, self.digest = gpu_name(), digest_of(ROOT)
        for name in ("results", "kept", "logs", "runs", "data"):
            (self.out / name).mkdir(parents=True, exist_ok=True)
        (self.out / "results" / self.gpu).mkdir(exist_ok=True)
        merge(ROOT / "results", self.out / "results")
        for folder in options.data:
            merge(folder, self.out / "data")
        if self.wheels:
            install(self.wheels, self.out / "site")
        self.code = copy_tree(self.out / "code" / digest_of(ROOT, (*DIGESTED, "scripts")), self.out, results=False)
        self.outcomes = self.out / "outcomes.tsv"
        machine = self.out / "logs" / "machine.log"
        if not machine.exists():
            with machine.open("wb") as log:
                for command in (["nvidia-smi"], [sys.executable, "-m", "pip", "list"]):
                    subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False)

    def is_done(self, part: Part) -> bool:
        """Return whether a part passed with this code."""
        if part.makes is not None and not (self.code / part.makes).exists():
            return False
        lines = self.outcomes.read_text(encoding="utf-8").splitlines() if self.outcomes.exists() else []
        ends = {(words[0], words[2], words[4]) for words in (line.split("\t") for line in lines)}
        return (part.name, "rc 0", self.digest) in ends

    def why_not(self, part: Part) -> str | None:
        """Return why a part cannot begin for want of data."""
        missing = [name for name in part.data if not (self.out / "data" / name).is_dir()]
        return f"--data has no {', '.join(missing)}" if missing else None

    def begin(self, part: Part, place: Place, left_s: float) -> Running:
        """Start a part on its cores."""
        limit = max(1.0, min(part.limit, left_s))
        values = {
            "gpu": self.gpu, "part": part.name, "cores": len(place.cores), "minutes": f"{max(0.1, (limit - 50) / 60):.2f}",
            "index": "-".join(map(str, place.gpus)), "data": shlex.quote(str(self.out / "data")),
            "wheels": shlex.quote(str(self.wheels or "")),
        }  # fmt: skip
        tree = self.code
        if part.own_tree:
            shutil.rmtree(self.out / "trees" / part.name, ignore_errors=True)
            tree = copy_tree(self.out / "trees" / part.name, self.out, results=True)
        tools = [str(path) for pattern in TOOLS for path in sorted(Path("/").glob(pattern), reverse=True)]
        environment = {
            **os.environ,
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", ""), *tools]),
            "PYTHONPATH": os.pathsep.join([str(tree / "src"), str(self.out / "site")]),
            "PYTHONUNBUFFERED": "1",
            "CUDA_VISIBLE_DEVICES": ",".join(map(str, place.gpus)),
            "OMP_NUM_THREADS": str(part.threads),
            "TWOFOUR_CACHE_DIR": str(self.out / "kernels"),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        mine = os.sched_getaffinity(0)
        os.sched_setaffinity(0, place.cores)  # a process begins on the cores of the one that starts it
        try:
            with (self.out / "logs" / f"{part.name}.log").open("ab") as log:
                words = shlex.split(part.command.format(**values))
                log.write(f"$ {shlex.join(words)}\n".encode())
                log.flush()
                process = subprocess.Popen(
                    words, cwd=tree, env=environment, start_new_session=True, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
                )
        finally:
            os.sched_setaffinity(0, mine)
        say(f"{part.name}: begins on GPU {values['index'] or 'none'}, {len(place.cores)} cores, {part.seconds} s expected")
        return Running(part, place, process, time.monotonic(), limit)

    def end(self, running: Running) -> bool:
        """Record how a part ended and return whether it passed."""
        running.kill()  # what it left behind
        part, code = running.part, running.process.returncode
        if code == 0 and part.publish:
            source, to = (self.code / name.format(part=part.name, gpu=self.gpu) for name in part.publish)
            shutil.copyfile(source, to)
        took = time.monotonic() - running.began
        tail = (self.out / "logs" / f"{part.name}.log").read_bytes()[-3000:].decode(errors="replace").replace("\r", "\n").split("\n")
        last = next((line.strip() for line in reversed(tail) if line.strip()), "").replace("\t", " ")[:160]
        told = "124" if running.told is not None and code else str(code)
        where = "gpu " + ",".join(map(str, running.place.gpus))
        line = "\t".join([part.name, where, f"rc {told}", f"{took:.0f} s of {running.limit:.0f}", self.digest, last])
        with self.outcomes.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        say(line)
        return code == 0

    def run(self, parts: list[Part], gpus: list[int], seconds: float) -> bool:
        """Run parts for so many seconds and return whether all passed."""
        end = time.monotonic() + seconds
        # One core stays with this process, which packs.
        own, *others = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {own})
        schedule, running, passed, packed = Schedule(parts, others or [own], gpus), [], True, 0.0
        try:
            while True:
                left = end - time.monotonic()
                while (begun := schedule.next(left)) is not None:
                    running.append(self.begin(*begun, left))
                if not running:
                    break
                for one in list(running):
                    if one.process.poll() is not None:
                        running.remove(one)
                        schedule.ended(one.part)
                        passed &= self.end(one)
                    elif time.monotonic() > min(one.began + one.limit, end):
                        one.stop()
                if time.monotonic() - packed > PACK_EVERY_S:
                    pack(self.out, self.tar)
                    packed = time.monotonic()
                time.sleep(0.3)
        finally:
            for one in running:
                one.kill()
            pack(self.out, self.tar)
        for part in schedule.waiting:
            say(f"{part.name}: not begun, {schedule.why_never(part) or f'it takes {part.needed_s} s'}")
        return passed and not schedule.waiting


def print_plan(parts: list[Part], gpus: int, seconds: float) -> None:
    """Print what of some parts is expected to begin when."""
    planned = predicted(parts, LISTED_CORES - 1, gpus, seconds)
    for begin, end, part, place in planned:
        where = f"GPU {','.join(map(str, place.gpus))}" if place.gpus else "CPU"
        say(f"  {begin:4.0f} to {end:3.0f} s  {where:8} {len(place.cores):2} cores  {part.name}{', quiet' if part.quiet else ''}")
    begun = {part for _, _, part, _ in planned}
    if left := [part.name for part in parts if part not in begun]:
        say(f"  no time for {', '.join(left)}")


def print_list(gpus: int, seconds: float) -> None:
    """Print the parts, the groups and the schedule."""
    for part in PARTS:
        goes_on = f", goes on in another call, {part.least} s at least" if part.least else ""
        needs = f"{part.gpus} GPU{'s' if part.gpus > 1 else ''}, {part.cores} cores{', quiet' if part.quiet else ''}"
        say(f"{part.name:25} {part.seconds:4} s, {part.limit} s at most, {needs}{goes_on}")
    for name, members in GROUPS.items():
        say(f"group {name}: {' '.join(members)}")
    for block, names in BLOCKS.items():
        say(f"block {block}: {names}")
        print_plan(chosen(names.split()), gpus, seconds)


def main() -> None:
    """Run or list."""
    parser = argparse.ArgumentParser(prog="scripts/gpu.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART")
    parser.add_argument("--block", choices=list(BLOCKS), help="the parts of a block of the schedule")
    parser.add_argument("--out", type=Path, default=Path("runs") / "gpu")
    parser.add_argument("--gpus", default="0,1", type=lambda text: [int(word) for word in text.split(",")])
    parser.add_argument("--seconds", type=float, default=570.0, help="after which every part is stopped")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels, where there is no registry")
    parser.add_argument("--data", type=Path, action="append", default=[], help="a folder of cifar10/, resnet-cifar10/, minilm/, stsb/ …")
    parser.add_argument("--tar", type=Path, help="OUT.tgz by default")
    parser.add_argument("--again", action="store_true", help="run what has passed too")
    parser.add_argument("--list", action="store_true", help="print the parts and the schedule, for a machine of 32 cores, and run nothing")
    options = parser.parse_args()
    names = options.parts + (BLOCKS[options.block].split() if options.block else [])
    try:
        parts = chosen([name for word in names for name in (BY_NAME if word == "all" else (word,))])
    except KeyError as error:
        parser.error(f"there is no part or group {error}, expected one of those that --list prints")
    if options.list:
        if parts:
            print_plan(parts, len(options.gpus), options.seconds)
        else:
            print_list(len(options.gpus), options.seconds)
        return
    if not parts:
        parser.error("expected a PART or --block; --list prints them")
    for folder in (*options.data, *([options.wheels] if options.wheels else [])):
        if not folder.is_dir():
            parser.error(f"folder {str(folder)!r} does not exist, expected one of data or wheels")
    # A shell that starts this in the background has ^C ignored, which everything started here would inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    deadline = time.monotonic() + options.seconds
    runner = Runner(options)
    todo = []
    for part in parts:
        if not options.again and runner.is_done(part):
            say(f"{part.name}: has passed already")
        elif why := runner.why_not(part):
            say(f"{part.name}: left out, {why}")
        else:
            todo.append(part)
    sys.exit(0 if runner.run(todo, options.gpus, deadline - time.monotonic()) else 1)


if __name__ == "__main__":
    main()
