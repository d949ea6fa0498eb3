"""How a piece of this package runs in an interpreter of its own.

Not `multiprocessing`: its children import the caller's main module again, so that a script without a main guard would run anew in each.
"""

import os
import sys
from pathlib import Path

_PACKAGES = str(Path(__file__).parents[2])


def python(code: str) -> tuple[list[str], dict[str, str]]:
    """Return the command that runs `code` with this package, and its environment; the current folder is not searched for modules."""
    # An empty entry would be that folder.
    path = os.pathsep.join(p for p in (_PACKAGES, *os.environ.get("PYTHONPATH", "").split(os.pathsep)) if p)
    return [sys.executable, "-P", "-c", code], {**os.environ, "PYTHONPATH": path}
