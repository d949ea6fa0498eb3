"""When a stage begins and ends: told to the listener and the log, its seconds kept over interruptions."""

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from twofour.compress.events import Event, Listener, StageFinished, StageStarted
from twofour.errors import UserCodeError
from twofour.files import write_text

log = logging.getLogger("twofour.compress")


class Stages:
    """Tells of the stages of a run, and keeps their seconds in a file, so that those before an interruption count."""

    def __init__(self, listener: Listener | None, file: Path) -> None:
        self._listener, self._file = listener, file
        self.seconds: dict[str, float] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        self._current: tuple[str, float, float] | None = None

    def tell(self, event: Event) -> None:
        """Pass an event on."""
        if self._listener is not None:
            self._listener(event)

    def mark(self) -> None:
        """Keep the seconds spent up to now."""
        if self._current is not None:
            name, before, start = self._current
            self.seconds[name] = before + time.perf_counter() - start
        write_text(self._file, json.dumps(self.seconds) + "\n")

    @contextmanager
    def stage(self, name: str, steps: int = 0) -> Iterator[list[str]]:
        """Time the body; it appends the summaries of the records it made to the list it is given."""
        self.tell(StageStarted(name, steps))
        log.info("%s …", name)
        self._current = (name, self.seconds.get(name, 0.0), time.perf_counter())
        summaries: list[str] = []
        try:
            yield summaries
        except UserCodeError as error:
            raise UserCodeError(f"{name}: {error}") from error
        self.mark()
        self._current = None
        for summary in summaries:
            log.info("%s", summary)
        self.tell(StageFinished(name, self.seconds[name], "; ".join(summaries)))
