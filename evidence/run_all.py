"""All accuracy experiments in the order of their weight: `python evidence/run_all.py FOLDER results/GPU [--gpus 2] [--minutes 9]`.

What is recorded is not trained again: stop it, run it again, and it goes on. `--only` names experiments; `--list` prints the commands with
the minutes expected on one H200. `--trial` runs everything at toy size, on a CPU too.
"""

import argparse
import logging
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

log = logging.getLogger("run_all")
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Job:
    """One command.

    Attributes:
        minutes: expected on one H200.
        trial: arguments that make it small.
    """

    script: str
    arguments: str
    minutes: float
    trial: str

    def command(self, folder: Path, out: Path, name: str, trial: bool) -> list[str]:
        """Return the words to run; what a trial adds comes last and so counts."""
        words = self.arguments.format(out=out).split() + (self.trial.split() if trial else [])
        return [sys.executable, str(HERE / self.script), str(folder), str(out / f"accuracy-{name}.json"), *words]


CIFAR_TRIAL = "--images 128 --epochs 1 --seeds 1 --batch 64 --dense-epochs 1"
TEXT_TRIAL = "--images 64 --steps 2 --batch 8 --seeds 1"
# What the search found best; only the jobs after it take it from there.
SEARCHED = "--searched {out}/accuracy-recipe.json"
# Few of the larger networks fill a GPU; in small fleets the first seeds are there before the last begin.
LARGE = f"--weight-decay 5e-4 --fleet 4 {SEARCHED}"
# As many seeds as an interval of ± 0.2 takes: the differences of ResNet-20 to 56 vary by 0.10 to 0.18 points over the seeds, so three are
# too few for ResNet-18 and MobileNetV2, and five enough for ResNet-20 over 200 epochs; those of STS-B by 0.03.
JOBS = {
    "recipe": Job("accuracy_cifar.py", "--nets ResNet-20 --search --seeds 2", 3, CIFAR_TRIAL),
    "cifar": Job("accuracy_cifar.py", f"--nets ResNet-32 ResNet-20 ResNet-56 ResNet-44 {SEARCHED}", 10, CIFAR_TRIAL + " --nets ResNet-20"),
    "stsb-recipe": Job("accuracy_minilm.py", "--task stsb --search --seeds 2 --steps 600", 2, TEXT_TRIAL),
    "stsb": Job("accuracy_minilm.py", "--task stsb --seeds 4 --searched {out}/accuracy-stsb-recipe.json", 2, TEXT_TRIAL),
    "stsb-distilled": Job("accuracy_minilm.py", "--task stsb --seeds 4 --labels 0", 2, TEXT_TRIAL),
    "sst2": Job("accuracy_minilm.py", "--task sst2 --seeds 16", 5, TEXT_TRIAL),
    "resnet18": Job("accuracy_cifar.py", f"--nets ResNet-18 --seeds 5 {LARGE}", 12, CIFAR_TRIAL),
    "mobilenetv2": Job("accuracy_cifar.py", f"--nets MobileNetV2 --seeds 5 {LARGE} --permute off on", 30, CIFAR_TRIAL),
    "ablations-resnet20": Job("ablations.py", f"--nets ResNet-20 --seeds 5 {SEARCHED}", 6, CIFAR_TRIAL),
    "ablations-mobilenetv2": Job("ablations.py", f"--nets MobileNetV2 --seeds 2 {LARGE}", 43, CIFAR_TRIAL),
    "cifar-200": Job("accuracy_cifar.py", f"--nets ResNet-20 --epochs 200 --seeds 5 {SEARCHED}", 9, CIFAR_TRIAL),
}


def attempt(command: list[str], environment: dict[str, str], started: float, minutes: float, least: float = 0.0) -> bool:
    """Run a command for what is left of the minutes, if that is more than `least`; return whether it came to its end."""
    left = minutes - (time.monotonic() - started) / 60
    return left > least and subprocess.run([*command, "--minutes", f"{left:.2f}"], env=environment, check=False).returncode == 0


def choose_kernels(path: Path, environment: dict[str, str]) -> None:
    """Let narrow.py write its choices for this GPU, once: of several processes one measures, alone, and the others wait.

    Without its choices the experiments use cuDNN: that it fails stops nothing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            subprocess.run([sys.executable, str(HERE / "narrow.py"), str(path)], env=environment, check=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=1e6, help="of all together; what is unfinished is kept and gone on with")
    parser.add_argument("--kept", type=Path, default=Path("runs/evidence"), help="where dense networks and unfinished trainings lie")
    parser.add_argument("--only", nargs="+", choices=list(JOBS), default=list(JOBS))
    parser.add_argument("--extra", default="", help='further arguments of every command: --extra="--lr 0.1"')
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--trial", action="store_true")
    a = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    started = time.monotonic()
    source = str(HERE.parent / "src")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH", ""))))}
    narrow = Path(os.environ.get("NARROW_CHOICES") or a.kept / "narrow.json")
    environment["NARROW_CHOICES"] = str(narrow)
    if shutil.which("nvidia-smi") and not a.list:
        choose_kernels(narrow, environment)
    failed = []
    for name in a.only:
        job = JOBS[name]
        command = [*job.command(a.folder, a.out, name, a.trial), "--gpus", str(a.gpus), "--kept", str(a.kept)]
        command += ["--per-gpu", "1"] * a.trial + a.extra.split()
        log.info("%s (%.0f GPU minutes expected): %s", name, job.minutes, " ".join(command[1:]))
        if a.list:
            continue
        if attempt(command, environment, started, a.minutes):
            continue
        # What failed before its time was up may work without our own kernels and without graphs of MiniLM's steps.
        if not attempt(command, {**environment, "NARROW_CHOICES": "", "EAGER": "1"}, started, a.minutes, least=1.0):
            failed.append(name)
    if failed:
        raise SystemExit(f"not finished: {', '.join(failed)}; run the same command again to go on")


if __name__ == "__main__":
    main()
