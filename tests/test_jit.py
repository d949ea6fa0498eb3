"""The run-time compiler and its cache: in-memory headers, honest keys, entries that survive other processes, damage and bad folders."""

import ctypes
import gc
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from twofour.errors import InputError, UnsupportedError
from twofour.jit import Cache, Source, compile_source, digest, driver, flatten, strip_comments
from twofour.jit.cache import default_cache

TINY = Source("tiny", 'extern "C" __global__ void tiny(float* x) { x[threadIdx.x] = 1.0f; }\n')


def test_headers_are_placed_once_and_missing_ones_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.cuh").write_text('#pragma once\n#include "b.cuh"\nint a;\n')
    (tmp_path / "b.cuh").write_text("#pragma once\nint b;\n")
    text = flatten('#include "a.cuh"\n#include "b.cuh"\nint c;\n', [tmp_path])
    assert [line for line in text.splitlines() if line and not line.startswith("#line")] == ["int b;", "int a;", "int c;"]
    with pytest.raises(InputError, match=r"line 1 includes 'gone.cuh', expected in one of .*; install the package again"):
        flatten('#include "gone.cuh"\n', [tmp_path])


def test_a_digest_ignores_comments_and_nothing_else(tmp_path: Path) -> None:
    assert strip_comments('int a; // x\n/* y\n */ char s[] = "//no";') == 'int a; char s[] = "//no";'
    path = tmp_path / "k.cuh"
    path.write_text("int a; // one\n")
    first = digest([path])
    path.write_text("// other\nint  a;\n")
    assert digest([path]) == first
    path.write_text("int b;\n")
    assert digest([path]) != first


def test_a_compiled_kernel_comes_back_from_the_cache(tmp_path: Path) -> None:
    compiled = Cache(tmp_path).get(TINY)
    assert compiled.cubin[:4] == b"\x7fELF"
    assert compiled.registers > 0
    assert compiled.complaints == []
    assert Cache(tmp_path, may_compile=False).get(TINY) == compiled


def test_the_key_holds_text_options_and_arch(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    keys = {cache.key(TINY), cache.key(Source("tiny", TINY.text + " ")), cache.key(TINY, "sm_90"), cache.key(TINY, options=("-O1",))}
    assert len(keys) == 4


def test_a_missing_entry_is_an_error_when_compiling_is_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWOFOUR_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TWOFOUR_NO_COMPILE", "1")
    with pytest.raises(UnsupportedError, match=r"kernel tiny is not in the cache .* and compiling is off; unset TWOFOUR_NO_COMPILE"):
        default_cache().get(TINY)


@pytest.mark.parametrize(
    ("damage", "content"), [("kernel.cubin", b"rubbish"), ("entry.json", b"rubbish"), ("entry.json", b"[" * 100_000), ("", b"rubbish")]
)
def test_a_damaged_entry_is_said_once_and_compiled_anew(
    tmp_path: Path, damage: str, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    cache = Cache(tmp_path)
    good = cache.get(TINY)
    place = tmp_path / cache.key(TINY)[:2] / cache.key(TINY)
    if not damage:
        shutil.rmtree(place)
    (place / damage).write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert cache.get(TINY).cubin == good.cubin
    assert caplog.text.count("is damaged") == 1
    assert Cache(tmp_path, may_compile=False).get(TINY).cubin == good.cubin


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cache folder .* cannot be written \(.*\); set TWOFOUR_CACHE_DIR to one that can"):
        Cache(tmp_path / "file" / "under").get(TINY)


def test_source_that_does_not_compile_shows_the_first_error() -> None:
    with pytest.raises(
        UnsupportedError,
        match=r"kernel bad did not compile for sm_90a with NVRTC \d+\.\d+: .*: error: this declaration has no storage class",
    ):
        compile_source(Source("bad", "nonsense;"))


def test_processes_that_race_for_one_entry_all_succeed(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from twofour.jit import Cache, Source;"
        f"print(len(Cache(Path({str(tmp_path)!r})).get(Source('tiny', {TINY.text!r})).cubin))"
    )
    running = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    sizes = {process.communicate(timeout=60)[0] for process in running}
    assert len(sizes) == 1
    assert all(process.returncode == 0 for process in running)
    assert not list(tmp_path.rglob(".new-*"))


def test_without_a_driver_a_launch_says_so() -> None:
    code = (
        "from twofour.errors import TwofourError\nfrom twofour.jit import driver\n"
        "try:\n    driver.bindings(); print('has a GPU')\nexcept TwofourError as e:\n    print(e)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "has a GPU" in said or "run on the CPU backend" in said


class Recorded:
    """In place of `cuLaunchKernelEx`: reads what the driver would read."""

    def __init__(self, size: int) -> None:
        self.size, self.error = size, 0
        self.seen: list[tuple[int, tuple[int, int, int], bytes]] = []

    def cuLaunchKernelEx(self, config: Any, kernel: Any, arguments: Any, extra: None) -> int:
        block = ctypes.string_at(arguments._obj[0], self.size)
        self.seen.append((config._obj.stream, tuple(config._obj.grid), block))
        return self.error


def test_a_launcher_keeps_its_blocks_and_forgets_the_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Recorded(8)
    monkeypatch.setattr(driver, "_library", lambda: library)
    monkeypatch.setattr(driver, "KEPT_BLOCKS", 2)
    launcher = driver.Launcher(1, 7, 128, 0)
    built: list[int] = []

    def build(value: int) -> bytes:
        built.append(value)
        return value.to_bytes(8, "little")

    for value in (1, 2, 1, 2, 3, 1):
        launcher.launch((value, 17), lambda value=value: build(value), 17)  # type: ignore[misc]
        gc.collect()
    assert built == [1, 2, 3, 1]
    assert library.seen == [(17, (7, 1, 1), v.to_bytes(8, "little")) for v in (1, 2, 1, 2, 3, 1)]
