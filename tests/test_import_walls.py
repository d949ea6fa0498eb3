"""A room imports only rooms printed above it; what must run without torch never imports it; importing the package is lazy."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "src" / "twofour"

# The order of docs/design.md.
ROOMS = [
    "version",
    "errors",
    "files",
    "ort",
    "pattern",
    "oracle",
    "jit",
    "kernels",
    "timing",
    "plan",
    "sources",
    "pruning",
    "training",
    "quantization",
    "exchange",
    "builder",
    "nn",
    "runtime",
    "report",
    "serving",
    "compress",
    "cli",
]
# Rooms that must work where torch, onnx and a compiler are absent: whatever they need of those is imported inside a function.
TORCH_FREE = ["errors", "files", "ort", "pattern", "oracle", "jit", "kernels", "timing", "plan", "runtime"]
# A room may not import these rooms although they stand above it.
FORBIDDEN = {"runtime": {"builder", "nn", "training", "pruning", "exchange", "sources"}}


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports_of(path: Path) -> list[tuple[int, str]]:
    """(line, absolute dotted name) of every import in the file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} uses a relative import; rooms are named in full"
            base = node.module or ""
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
    return found


def test_every_folder_is_a_room_of_the_design() -> None:
    present = {room_of(p) for p in ROOT.rglob("*.py")} - {"__init__", "__main__"}
    assert present <= set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_rooms_above_it(room: str) -> None:
    allowed = set(ROOMS[: ROOMS.index(room) + 1]) - FORBIDDEN.get(room, set())
    wrong = []
    for path in ROOT.rglob("*.py"):
        if (path.parent == ROOT and path.stem == "__init__") or room_of(path) != room:
            continue
        for line, name in imports_of(path):
            parts = name.split(".")
            if parts[0] == "twofour" and len(parts) > 1 and parts[1] in ROOMS and parts[1] not in allowed:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong, wrong


BLOCKER = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "onnx", "onnx_ir", "onnxscript"}:
            raise ModuleNotFoundError(f"blocked: {name}", name=name)
sys.meta_path.insert(0, Block())
"""


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, twofour; heavy = {'torch','onnx','numba','sklearn','matplotlib'} & set(sys.modules); assert not heavy, heavy"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("room", TORCH_FREE)
def test_every_module_of_a_torch_free_room_imports_without_torch(room: str) -> None:
    modules = []
    for path in sorted(ROOT.rglob("*.py")):
        if room_of(path) == room:
            dotted = ".".join(["twofour", *path.relative_to(ROOT).with_suffix("").parts])
            modules.append(dotted.removesuffix(".__init__"))
    code = BLOCKER + "\n".join(f"import {m}" for m in modules)
    subprocess.run([sys.executable, "-c", code], check=True)
