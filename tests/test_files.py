"""Files that are written aside: many threads at one path, permissions, nothing left over."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from twofour.compress.folder import ASIDE
from twofour.errors import InputError
from twofour.files import write_text, written_aside


def test_threads_at_one_path_write_apart_and_the_last_wins(tmp_path: Path) -> None:
    path, together = tmp_path / "a.txt", threading.Barrier(4, timeout=60)

    def write(number: int) -> str:
        with written_aside(path) as aside:
            aside.write_text(str(number))
            together.wait()
            assert aside.read_text() == str(number)
            together.wait()
        return aside.name

    with ThreadPoolExecutor(4) as pool:
        names = list(pool.map(write, range(4)))
    assert len(set(names)) == 4
    assert all((found := ASIDE.fullmatch(name)) and found[1] == "a.txt" for name in names)  # what `compress` knows as left over
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text() in "0123"


def test_a_file_has_the_permissions_of_any_other(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with written_aside(tmp_path / "a.txt") as aside:
            aside.write_text("a")
            aside.chmod(0o600)  # as a library may make its own
        assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o640
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)


def test_a_body_that_raises_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    def fail() -> None:
        with written_aside(tmp_path / "a.txt") as aside:
            aside.write_text("new")
            raise OSError(5, os.strerror(5))

    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(InputError, match=r"a.txt' cannot be written: Input/output error"):
        fail()
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.txt", "old")]
