"""A run's events as live progress in the terminal; plain lines where there is none; JSON lines for programs."""

import json
import time
from collections.abc import Callable
from types import TracebackType

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from twofour.cli.console import say
from twofour.compress import Compression
from twofour.compress.events import (
    EpochFinished,
    EpochsRestored,
    Event,
    Listener,
    StageFinished,
    StageStarted,
    StepsDone,
    to_json,
)
from twofour.errors import TwofourError

# Where there is no terminal, a stage tells the time left this soon, then this often.
SECONDS_BEFORE_FIRST_LINE = 1.0
SECONDS_BETWEEN_LINES = 10.0


def duration_text(seconds: float) -> str:
    """Return a duration as people say it: 42 s, 12 min, 3 h 05 min, 2 d 4 h, 7 years."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h" if days < 730 else f"{days // 365:,} years"


class ProgressDisplay:
    """Shows stages, epochs, loss, metric, items a second and time left."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = console.is_terminal
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[status]}"),
            console=console,
            transient=True,
            disable=not self._live,
        )
        self._task = self._progress.add_task("", total=None, status="")
        self._steps, self._done, self._restored, self._start = 0, 0, 0, 0.0
        self._told: float | None = None
        self._epoch_text = ""

    def __enter__(self) -> "ProgressDisplay":
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        if isinstance(event, StageStarted):
            self._steps, self._done, self._restored, self._epoch_text = event.steps, 0, 0, ""
            self._start, self._told = time.perf_counter(), None
            self._progress.reset(self._task, total=event.steps or None, description=event.stage, status="")
        elif isinstance(event, EpochsRestored):
            self._done += event.done
            self._restored += event.done
            self._progress.update(self._task, completed=self._done)
            say(self._console, f"  seed {event.seed}, {event.variant}: {event.done} of {event.epochs} epochs were done before")
        elif isinstance(event, StepsDone):
            self._within(event)
        elif isinstance(event, EpochFinished):
            self._finished(event)
        elif isinstance(event, StageFinished):
            self._progress.update(self._task, status="")
            line = Text.assemble(("✓", "green"), f" {event.stage} ", (f"{event.seconds:.1f} s", "dim"))
            self._console.print(line, soft_wrap=True)

    def _left(self, done: float) -> str:
        """Return the time left in the stage, from what this run has done of it."""
        share = done - self._restored
        if share <= 0:
            return ""
        return f", about {duration_text((time.perf_counter() - self._start) / share * (self._steps - done))} left"

    def _is_due(self) -> bool:
        now = time.perf_counter()
        since, wait = (self._start, SECONDS_BEFORE_FIRST_LINE) if self._told is None else (self._told, SECONDS_BETWEEN_LINES)
        return not self._live and now - since >= wait

    def _tell(self, line: str) -> None:
        self._told = time.perf_counter()
        say(self._console, f"  {line}")

    def _within(self, event: StepsDone) -> None:
        step = event.step
        done = self._done + step.items / step.of_items
        status = f"seed {event.seed}, {event.variant}: {self._epoch_text}{step.items_per_s:,.0f} items/s{self._left(done)}"
        self._progress.update(self._task, completed=done, status=status)
        if self._is_due():
            self._tell(f"{status}, epoch {step.epoch} of {event.epochs}, {step.items:,} of {step.of_items:,} items")

    def _finished(self, event: EpochFinished) -> None:
        self._done += 1
        epoch = event.epoch
        self._epoch_text = f"loss {epoch.loss:.3f}, {epoch.metric:.2f}, "
        status = f"seed {event.seed}, {event.variant}: loss {epoch.loss:.3f}, {epoch.metric:.2f}{self._left(self._done)}"
        self._progress.update(self._task, completed=self._done, status=status)
        if self._is_due() or (not self._live and epoch.number == event.epochs):
            self._tell(f"{status}, epoch {epoch.number} of {event.epochs}")
        if epoch.number == event.epochs:
            self._epoch_text = ""


def print_events(run: Callable[[Listener], Compression]) -> Compression:
    """Run, and print each event as one line of JSON; the last line is `finished` with the outcome, or `failed` with the sentence."""

    def line(value: dict[str, object]) -> None:
        click.echo(json.dumps({"time": round(time.time(), 3), **value}))

    try:
        done = run(lambda event: line(to_json(event)))
    except TwofourError as error:
        line({"event": "failed", "message": str(error)})
        raise
    except KeyboardInterrupt:
        line({"event": "failed", "message": "interrupted"})
        raise
    report = done.report
    accuracy = {row.variant: row.values for row in report.accuracy}
    outcome = {"out": str(done.out), "metric": report.metric, "accuracy": accuracy}
    line({"event": "finished", **outcome, "passed": not done.failed_checks, "failed_checks": done.failed_checks})
    return done
