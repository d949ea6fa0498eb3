"""A run's events as live progress in the terminal; plain lines where there is none."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from twofour.compress.events import EpochFinished, Event, StageFinished, StageStarted


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
        self._steps, self._done, self._start = 0, 0, 0.0

    def __enter__(self) -> "ProgressDisplay":
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        if isinstance(event, StageStarted):
            self._steps, self._done, self._start = event.steps, 0, time.perf_counter()
            self._progress.reset(self._task, total=event.steps or None, description=event.stage, status="")
        elif isinstance(event, EpochFinished):
            self._done += 1
            epoch = event.epoch
            status = f"seed {event.seed}, {event.variant}: loss {epoch.loss:.3f}, {epoch.metric:.2f}"
            self._progress.update(self._task, advance=1, status=status)
            if not self._live and epoch.number == event.epochs:
                left = (time.perf_counter() - self._start) / self._done * (self._steps - self._done)
                self._console.print(f"  {status} after {event.epochs} epochs, about {left:.0f} s left", highlight=False)
        elif isinstance(event, StageFinished):
            self._progress.update(self._task, status="")
            self._console.print(f"[green]✓[/] {event.stage} [dim]{event.seconds:.1f} s[/]", highlight=False)
