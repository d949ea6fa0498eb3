"""`twofour models`."""

import click


@click.command()
@click.argument("pattern", default="*")
def command(pattern: str) -> None:
    """List the models that MODEL may name, one a line; PATTERN is a glob such as `timm:*resnet*`."""
    from fnmatch import fnmatchcase

    from twofour.errors import InputError
    from twofour.sources.models import list_models

    found = [name for name in list_models() if fnmatchcase(name, pattern)]
    if not found:
        raise InputError(f"models: {pattern!r} matches no model; torchvision: and timm: names are there once those are installed")
    click.echo("\n".join(found))
