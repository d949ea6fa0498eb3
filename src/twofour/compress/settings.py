"""What one run is asked to do, and what of it decides the outcome."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from twofour.compress.records import digest
from twofour.files import existing_file
from twofour.sources import Task
from twofour.sources.files import is_function_spec
from twofour.training import Recipe


@dataclass(frozen=True)
class Settings:
    """What one `compress` was asked to do; see `compress` for the meaning of each."""

    model: str
    data: str
    out: Path
    weights: Path | None = None
    recipe: Recipe = field(default_factory=Recipe)
    seed: int = 0
    seeds: int = 1
    method: str = "magnitude"
    permute: bool | float = True
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    device: str = "cpu"
    measure_seconds: float = 2.0
    command: str = ""

    def arguments(self, task: Task) -> dict[str, Any]:
        """Return everything that the weights of this run follow from, as plain JSON values; a run is resumed under equal ones only."""
        files = {}
        for spec in (self.model, self.data):
            if is_function_spec(spec):
                file = existing_file(spec.rpartition(":")[0], "file")
                files[file.name] = digest(file)
        weights = None if self.weights is None else digest(existing_file(self.weights, "weights file"))
        return {
            "model": self.model,
            "data": self.data,
            "items": {"train": len(task.train), "validation": len(task.validation)},  # type: ignore[arg-type]
            "files": files,
            "weights": weights,
            "recipe": self.recipe.model_dump(),
            "seed": self.seed,
            "seeds": self.seeds,
            "method": self.method,
            "permute": self.permute,
            "include": list(self.include),
            "exclude": list(self.exclude),
            "device": self.device,
        }
