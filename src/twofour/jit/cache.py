"""Compiled kernels on disk, found by content. Safe for any number of processes: entries appear whole by a rename and are never changed."""

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from twofour.errors import InputError, UnsupportedError
from twofour.jit.child import python
from twofour.jit.compiler import ARCH, Compiled, compile_source, compiler_version
from twofour.jit.source import Source

logger = logging.getLogger(__name__)
SCHEMA = 1


class Cache:
    """Cubins under a folder, one sub-folder a key: kernel.cubin, kernel.cu beside it, report.txt, entry.json with the cubin's digest.

    The key is SHA-256 over schema, source text (headers included), options, compiler version and arch, so a cubin made on a machine
    without a GPU serves every machine. Two processes that compile the same key both succeed; the first rename wins.
    """

    def __init__(self, folder: Path, *, may_compile: bool = True) -> None:
        """Use `folder`, made when first written; with `may_compile` false a missing entry is an error."""
        self.folder = folder
        self.may_compile = may_compile
        self._told: set[str] = set()

    def key(self, source: Source, arch: str = ARCH, options: tuple[str, ...] = ()) -> str:
        """Return the hex key of a compilation."""
        parts = [str(SCHEMA), source.name, source.text, json.dumps(options), compiler_version(), arch]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def get(self, source: Source, arch: str = ARCH, options: tuple[str, ...] = ()) -> Compiled:
        """Return the compiled `source`, from the cache or by compiling it.

        Raises:
            UnsupportedError: it is not cached and compiling is forbidden, or it does not compile.
            InputError: the folder cannot be written.
        """
        key = self.key(source, arch, options)
        found = self._read(key)
        if found is not None:
            return found
        if not self.may_compile:
            raise UnsupportedError(f"kernel {source.name} is not in the cache {self.folder} and compiling is off; unset TWOFOUR_NO_COMPILE")
        compiled = compile_source(source, arch, options)
        self._write(key, source, compiled)
        return compiled

    def has(self, source: Source, arch: str = ARCH, options: tuple[str, ...] = ()) -> bool:
        """Return whether `source` is in the cache, whole."""
        return self._read(self.key(source, arch, options)) is not None

    def _read(self, key: str) -> Compiled | None:
        place = self.folder / key[:2] / key
        try:
            entry = json.loads((place / "entry.json").read_text())
            cubin = (place / "kernel.cubin").read_bytes()
            report = (place / "report.txt").read_text()
        except (FileNotFoundError, NotADirectoryError):
            if place.exists():
                self._tell(place, "a file of it is missing")
            return None
        except (OSError, ValueError, RecursionError) as e:
            self._tell(place, str(e))
            return None
        if not isinstance(entry, dict) or entry.get("sha256") != hashlib.sha256(cubin).hexdigest():
            self._tell(place, "the cubin's digest is not the recorded one")
            return None
        return Compiled(cubin, report)

    def _tell(self, place: Path, why: str) -> None:
        if str(place) not in self._told:
            self._told.add(str(place))
            logger.warning("cache entry %s is damaged (%s) and is compiled anew", place, why)

    def _write(self, key: str, source: Source, compiled: Compiled) -> None:
        place = self.folder / key[:2] / key
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            fresh = Path(tempfile.mkdtemp(prefix=".new-", dir=place.parent))
        except OSError as e:
            raise InputError(f"cache folder {self.folder} cannot be written ({e.strerror}); set TWOFOUR_CACHE_DIR to one that can") from e
        try:
            (fresh / "kernel.cubin").write_bytes(compiled.cubin)
            (fresh / "kernel.cu").write_text(source.text)
            (fresh / "report.txt").write_text(compiled.report)
            (fresh / "entry.json").write_text(json.dumps({"name": source.name, "sha256": hashlib.sha256(compiled.cubin).hexdigest()}))
            if place.exists() and self._read(key) is None:
                shutil.rmtree(place, ignore_errors=True)
                if place.is_file():
                    place.unlink()
            try:
                fresh.rename(place)
            except OSError:
                # Another process was first; its entry has the same content.
                if not place.exists():
                    raise
        except OSError as e:
            raise InputError(f"cache folder {self.folder} cannot be written ({e.strerror}); set TWOFOUR_CACHE_DIR to one that can") from e
        finally:
            shutil.rmtree(fresh, ignore_errors=True)


def default_cache() -> Cache:
    """Return the cache in TWOFOUR_CACHE_DIR, else in the user's cache folder; TWOFOUR_NO_COMPILE=1 forbids compiling."""
    folder = os.environ.get("TWOFOUR_CACHE_DIR") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "twofour"
    )
    return Cache(Path(folder) / "kernels", may_compile=os.environ.get("TWOFOUR_NO_COMPILE", "0") in ("", "0"))


def fill_cache(sources: Iterable[Source], jobs: int | None = None) -> int:
    """Compile those of `sources` that the default cache lacks, several at once, and return how many those were.

    The compiler takes a second a kernel on one core and an engine tries about a hundred. A kernel that does not compile is left for the
    one who asks for it by name.

    Args:
        jobs: processes; None takes one a core that this process may use.
    """
    cache = default_cache()
    missing = [source for source in dict.fromkeys(sources) if not cache.has(source)]
    if not cache.may_compile:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = min(jobs or cores, len(missing))
    if processes <= 1:
        _fill(missing)
    else:
        with ThreadPoolExecutor(processes) as pool:
            list(pool.map(_fill_apart, (missing[first::processes] for first in range(processes))))
    return len(missing)


def _fill(sources: Iterable[Source]) -> None:
    cache = default_cache()
    for source in sources:
        with suppress(UnsupportedError):
            cache.get(source)


def _fill_apart(sources: Sequence[Source]) -> None:
    """Compile in a process of its own: the compiler holds a lock, so that threads would take turns."""
    command, environment = python("from twofour.jit.cache import fill_from_input; fill_from_input()")
    request = json.dumps([[source.name, source.text] for source in sources])
    done = subprocess.run(command, input=request, text=True, capture_output=True, env=environment, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise UnsupportedError(f"compiling {len(sources)} kernels in a process of its own failed (exit code {done.returncode}): {last}")


def fill_from_input() -> None:
    """Compile the sources described on standard input: the body of the process."""
    _fill(Source(name, text) for name, text in json.load(sys.stdin))
