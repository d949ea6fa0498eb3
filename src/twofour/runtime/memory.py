"""Peak memory of an engine, measured in a process of its own, which imports nothing but the runtime."""

import os
import subprocess
import sys
from pathlib import Path

from twofour.errors import TwofourError


def resident_bytes() -> tuple[int, int]:
    """Return (now, peak) resident memory of this process in bytes.

    NOTE: on Linux `ru_maxrss` survives fork and exec, so a child would report its parent's peak; VmHWM belongs to the new program.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmRSS"].split()[0]) * 1024, int(fields["VmHWM"].split()[0]) * 1024
    import resource

    import psutil

    unit = 1 if sys.platform == "darwin" else 1024
    return psutil.Process().memory_info().rss, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_bytes_of_run(plan_path: str, batch: int) -> int:
    """Return how much the peak resident memory of this process grows by loading a plan and running it three times, in bytes.

    The interpreter, the libraries and what they allocate when imported are not counted.
    """
    import onnxruntime  # noqa: F401 - imported first, so that its own memory is part of the base

    from twofour.runtime.engine import load

    base, _ = resident_bytes()
    engine = load(plan_path)
    inputs = engine.random_inputs(batch)
    for _ in range(3):
        engine(*inputs)
    return max(0, resident_bytes()[1] - base)


def measure_peak_bytes(plan_path: Path, batch: int) -> int:
    """Return the peak memory of a plan at one batch size, from a fresh process.

    Raises:
        TwofourError: the process failed; the message holds its last line.
    """
    command = [sys.executable, "-P", "-c", "from twofour.runtime.memory import main; main()", str(plan_path), str(batch)]
    # -P keeps the current folder out of the import path; the package is found where this process found it, installed or not.
    here = str(Path(__file__).parents[2])
    path = os.pathsep.join(p for p in (here, *os.environ.get("PYTHONPATH", "").split(os.pathsep)) if p)  # an empty entry is this folder
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path})
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise TwofourError(f"measuring the memory of {plan_path.name} failed: {last}")
    return int(done.stdout)


def main() -> None:
    """Print the peak of `sys.argv[1]` at batch `sys.argv[2]`: the body of the process that `measure_peak_bytes` starts."""
    sys.stdout.write(f"{peak_bytes_of_run(sys.argv[1], int(sys.argv[2]))}\n")
