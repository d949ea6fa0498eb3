"""How `twofour prune` was asked to prune."""

from dataclasses import dataclass
from pathlib import Path

from twofour.errors import InputError


@dataclass(frozen=True)
class Asked:
    """The options of `twofour prune`, as its help says."""

    method: str
    permute: bool
    pattern: str
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    sensitivity: bool
    by: str
    keep_dense: str | None
    budget: float | None
    by_block: bool
    resume: Path | None
    calibration: int = 2048
    batch: int = 256
    device: str = "cpu"

    def refuse_contradictions(self) -> None:
        """Raise InputError for options that need or exclude each other."""
        if (self.keep_dense is None) != (self.budget is None):
            raise InputError(
                "prune: --keep-dense auto and --budget belong together, expected both; for example --keep-dense auto --budget 0.5"
            )
        if sum((self.sensitivity, self.keep_dense is not None, self.by_block)) > 1:
            raise InputError(
                "prune: --sensitivity, --keep-dense and --by-block exclude each other, expected one; run them one after another"
            )
        if self.by == "loss" and not self.sensitivity:
            raise InputError("prune: --by says what --sensitivity measures, expected both; add --sensitivity")
        if self.resume is not None and not self.by_block:
            raise InputError("prune: --resume keeps finished blocks, expected --by-block; --sensitivity goes on from its own --out")
