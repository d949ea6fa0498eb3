"""Finished searches on disk, so that an interrupted run goes on where it ended."""

import os
from pathlib import Path

import numpy as np

from twofour.errors import InputError
from twofour.pruning.permutation.labels import Ints


class Progress:
    """Orders by the digest of what was searched; a file that is rewritten, through a temporary name, after every search.

    One process writes a file at a time.
    """

    def __init__(self, path: str | Path | None) -> None:
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        self.path = None if path is None else Path(path)
        self.orders: dict[str, Ints] = {}
        if self.path is not None and self.path.exists():
            try:
                self.orders = {k: v.astype(np.int64) for k, v in load_file(str(self.path)).items()}
            except (SafetensorError, OSError) as error:
                raise InputError(f"resume file {self.path} cannot be read ({error}); delete it or name another") from error

    def get(self, mark: str) -> Ints | None:
        return self.orders.get(mark)

    def put(self, mark: str, order: Ints) -> None:
        from safetensors.numpy import save_file

        self.orders[mark] = order
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self.path.with_name(f"{self.path.name}.{os.getpid()}")
            save_file({k: v.astype(np.int32) for k, v in self.orders.items()}, str(temporary))
            os.replace(temporary, self.path)
