"""The wheel holds everything the package reads at run time."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_wheel_is_pure_and_whole(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("twofour-*-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("twofour/")}
        archive.extractall(tmp_path / "site")
    source = ROOT / "src"
    wanted = {str(p.relative_to(source)) for p in (source / "twofour").rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert packed == wanted
    code = (
        "import twofour; from twofour.training.recipe import shipped_recipes; assert 'digits' in shipped_recipes(); print(twofour.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); {code}"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.startswith(str(tmp_path))
