"""A run's events as live progress in the terminal; plain lines where there is none."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from twofour.cli.console import say
from twofour.compress.events import EpochFinished, Event, StageFinished, StageStarted

# Where there is no terminal, a long training tells how it does this often.
SECONDS_BETWEEN_LINES = 10.0


class ProgressDisplay:
    """Shows stages, epochs, loss, metric and time left."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = console.is_terminal
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
            console=console,
            transient=True,
            disable=not self._live,
        )
        self._task = self._progress.add_task("", total=None, status="")
        self._steps, self._done, self._start, self._told = 0, 0, 0.0, 0.0

    def __enter__(self) -> "ProgressDisplay":
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        if isinstance(event, StageStarted):
            self._steps, self._done, self._start, self._told = event.steps, 0, time.perf_counter(), time.perf_counter()
            self._progress.reset(self._task, total=event.steps or None, description=event.stage, status="")
        elif isinstance(event, EpochFinished):
            self._done += 1
            epoch = event.epoch
            status = f"seed {event.seed}, {event.variant}: loss {epoch.loss:.3f}, {epoch.metric:.2f}"
            self._progress.update(self._task, advance=1, status=status)
            due = time.perf_counter() - self._told >= SECONDS_BETWEEN_LINES
            if not self._live and (epoch.number == event.epochs or due):
                self._told = time.perf_counter()
                left = (time.perf_counter() - self._start) / self._done * (self._steps - self._done)
                say(self._console, f"  {status}, epoch {epoch.number} of {event.epochs}, about {left:.0f} s left")
        elif isinstance(event, StageFinished):
            self._progress.update(self._task, status="")
            line = Text.assemble(("✓", "green"), f" {event.stage} ", (f"{event.seconds:.1f} s", "dim"))
            self._console.print(line, soft_wrap=True)
