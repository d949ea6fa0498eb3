"""CUDA source as the compiler gets it: one text, headers in place, so that a cache key over it covers everything it includes."""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from twofour.errors import InputError

_INCLUDE = re.compile(r'^\s*#include\s+"([^"]+)"\s*$')


@dataclass(frozen=True)
class Source:
    """One compilable text and the name of its `extern "C"` kernel."""

    name: str
    text: str


def flatten(text: str, folders: Iterable[Path], _seen: set[str] | None = None) -> str:
    """Return `text` with each `#include "..."` replaced by that file once, found in `folders`; `#line` keeps messages readable.

    Raises:
        InputError: a header is in none of the folders.
    """
    folders = list(folders)
    seen = set() if _seen is None else _seen
    lines = []
    for number, line in enumerate(text.splitlines(), 1):
        match = _INCLUDE.match(line)
        if not match:
            if line.strip() != "#pragma once":
                lines.append(line)
            continue
        header = match.group(1)
        if header in seen:
            continue
        seen.add(header)
        path = next((folder / header for folder in folders if (folder / header).is_file()), None)
        if path is None:
            raise InputError(
                f"line {number} includes {header!r}, expected in one of {', '.join(map(str, folders))}; install the package again"
            )
        lines += [f'#line 1 "{header}"', flatten(path.read_text(), folders, seen), f"#line {number + 1}"]
    return "\n".join(lines) + "\n"


_COMMENT_OR_STRING = re.compile(r'"(?:\\.|[^"\\])*"|//[^\n]*|/\*.*?\*/', re.DOTALL)


def strip_comments(text: str) -> str:
    """Return C++ `text` without comments and with every run of white space as one space; string literals stay."""
    code = _COMMENT_OR_STRING.sub(lambda m: m.group(0) if m.group(0).startswith('"') else " ", text)
    return " ".join(code.split())


def digest(files: Iterable[Path]) -> str:
    """Return 16 hex digits over the device sources in `files`, comments stripped: what a measured row was measured with."""
    state = hashlib.sha256()
    for path in sorted(files, key=lambda p: p.name):
        state.update(path.name.encode() + b"\0" + strip_comments(path.read_text()).encode() + b"\0")
    return state.hexdigest()[:16]
