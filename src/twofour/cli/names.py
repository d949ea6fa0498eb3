"""Names that the shell completes. The long list of models is kept in the user's cache, because making it imports the zoos."""

import importlib.metadata
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import click
from click.shell_completion import CompletionItem

ZOO_PACKAGES = ("twofour", "torchvision", "timm")


def cache_file() -> Path:
    """Return where the list of models is kept: named by the versions of what it was made from."""
    versions = []
    for package in ZOO_PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{package}-{importlib.metadata.version(package)}")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "twofour" / f"models-{'-'.join(versions) or 'none'}.txt"


def model_names() -> list[str]:
    """Return every model's name, from the cache or made and kept there."""
    path = cache_file()
    with suppress(OSError):
        return path.read_text(encoding="utf-8").split()
    from twofour.errors import TwofourError
    from twofour.files import write_text
    from twofour.sources.models import list_models

    names = list_models()
    # A cache that cannot be kept costs time only.
    with suppress(OSError, TwofourError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, "\n".join(names) + "\n")
    return names


def _matching(names: Iterable[str], incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def _paths(prefix: str, rest: str, folders_only: bool) -> list[CompletionItem]:
    """Complete the path behind a prefix such as `imagefolder:`."""
    parent = Path(rest[: rest.rfind("/") + 1] or ".")
    shown = "" if not rest.rpartition("/")[1] else rest[: rest.rfind("/") + 1]
    found = []
    with suppress(OSError):
        for entry in sorted(parent.iterdir()):
            if entry.name.startswith(rest.rpartition("/")[2]) and (entry.is_dir() or not folders_only) and not entry.name.startswith("."):
                found.append(CompletionItem(f"{prefix}{shown}{entry.name}{'/' if entry.is_dir() else ''}"))
    return found


def complete_model(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete a MODEL: names of the zoos a zoo at a time, folders behind `hf:`, else the user's files."""
    prefix, colon, rest = incomplete.partition(":")
    if colon and prefix == "hf":
        return _paths("hf:", rest, folders_only=True)
    if colon:
        return _matching(model_names(), incomplete)
    zoos = ["demo", "torchvision:", "timm:", "hf:"]
    return _matching(zoos, incomplete) or [CompletionItem(incomplete, type="file")]


def complete_data(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete the name of data: kinds, then the folder."""
    prefix, colon, rest = incomplete.partition(":")
    if colon:
        return _paths(f"{prefix}:", rest, folders_only=True)
    return _matching(["digits", "imagefolder:", "cifar10:"], incomplete) or [CompletionItem(incomplete, type="file")]


def complete_recipe(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete a recipe: a shipped name, else a file."""
    shipped = sorted(file.stem for file in (Path(__file__).parents[1] / "training" / "recipes").glob("*.toml"))
    return _matching(shipped, incomplete) or [CompletionItem(incomplete, type="file")]
