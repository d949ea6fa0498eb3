"""Options that several sub-commands share."""

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from twofour.cli import names


class NamedPath(click.Path):
    """A path; an empty or blank one, as an unset variable of a shell gives it, would mean the current folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """As click does, but refuse a blank name."""
        if not str(value).strip():
            self.fail(f"{str(value)!r} is blank, expected a file or folder", param, ctx)
        return super().convert(value, param, ctx)


PATH = NamedPath(path_type=Path)
Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

model_argument: Decorator = click.argument("model", shell_complete=names.complete_model)
data_option: Decorator = click.option("--data", required=True, help="Data set by name.", shell_complete=names.complete_data)
weights_option: Decorator = click.option("--weights", type=PATH, help="Weights: safetensors, or a torch state dict.")
recipe_option: Decorator = click.option(
    "--recipe", help="Recipe: a shipped name or a TOML file; by default the one named like the data.", shell_complete=names.complete_recipe
)
workers_option: Decorator = click.option(
    "--workers", type=click.IntRange(0), help="Processes that load data; by default the data's own choice."
)
skip_bad_option: Decorator = click.option("--skip-bad", is_flag=True, help="Leave out images that cannot be read, and say how many.")
device_option: Decorator = click.option("--device", default="cpu", show_default=True, help="Where to train: cpu, cuda or cuda:N.")
resume_option: Decorator = click.option("--resume", is_flag=True, help="Go on where a run with the same arguments was stopped.")
include_option: Decorator = click.option(
    "--include", multiple=True, metavar="GLOB", help="Prune these layers although the default leaves them."
)
exclude_option: Decorator = click.option("--exclude", multiple=True, metavar="GLOB", help="Leave these layers dense.")
method_option: Decorator = click.option(
    "--method",
    default="magnitude",
    show_default=True,
    help="How to choose what is pruned: magnitude, or by calibration data wanda, ria, sparsegpt-mask, sparsegpt, alps.",
)
permute_option: Decorator = click.option(
    "--permute/--no-permute", default=True, show_default=True, help="Reorder channels first where proven harmless."
)
json_option: Decorator = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
threads_option: Decorator = click.option("--threads", type=click.IntRange(1), help="CPU threads.")


def command_line() -> str:
    """Return the command as the user can type it again."""
    return shlex.join(["twofour", *sys.argv[1:]])
