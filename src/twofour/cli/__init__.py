"""The command line: one thin file a sub-command."""

from twofour.cli.group import main

__all__ = ["main"]
