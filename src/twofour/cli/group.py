"""The command `twofour`: finds the sub-command, turns errors into one sentence and exit code 2."""

import importlib
import logging
import os
import sys
from typing import Any

import click

from twofour.errors import TwofourError, VerificationError, nearest
from twofour.version import __version__

# Sub-command -> its one-line help, so that listing them imports none of them.
COMMANDS = {
    "compress": "Dense network in; 2:4 network, engine and report out.",
    "prune": "Prune a network's weights to 2:4.",
    "train": "Train by a recipe; masks of a 2:4 network are held.",
    "export": "Write checked ONNX.",
    "estimate": "What 2:4 would buy an ONNX file on GPUs that are not here: a prediction, layer by layer.",
    "build": "ONNX → plan.",
    "run": "Run a plan on inputs from a file.",
    "measure": "Latency, throughput and memory of plans and ONNX files, interleaved.",
    "inspect": "Which layers of a file are 2:4, which could be, which not and why.",
    "report": "Make the page of a run or of a plan's build report again; compare several runs.",
    "models": "The models that MODEL may name.",
    "completion": "The script that lets a shell complete names.",
    "doctor": "What is installed, which GPU, which backends work.",
}
# Sub-commands that keep what they have done when they are stopped.
RESUMABLE = ("compress", "train")
# What a shell reports of a program that wrote to a closed pipe: 128 + SIGPIPE.
READER_GONE = 141


class Commands(click.Group):
    """Loads a sub-command's file when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the sub-commands in the order of the pipeline."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a sub-command, or None if there is none of that name."""
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(f"twofour.cli.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, but an unknown name gets the nearest known one."""
        if args and not args[0].startswith("-") and args[0] not in COMMANDS:
            ctx.fail(f"no such command {args[0]!r}, expected one of {', '.join(COMMANDS)}{nearest(args[0], COMMANDS)}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """As click does, but a closed pipe gets an exit code of its own: click's is that of a failed check."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            # Whatever is still buffered would raise once more while Python ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise click.exceptions.Exit(READER_GONE) from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list without importing any of them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="twofour")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def twofour(debug: bool) -> None:
    """2:4 structured sparsity, whole: a dense network in; a verified, measured, faster 2:4-sparse engine and report out."""


def sentence_of(error: Exception) -> str:
    """Return an error as one sentence; what the system refused (a file, memory) is named with the cure."""
    if isinstance(error, TwofourError):
        return str(error)
    if isinstance(error, MemoryError):
        return f"out of memory ({error}); use a smaller batch or file" if str(error) else "out of memory; use a smaller batch or file"
    if isinstance(error, OSError) and error.filename is not None:
        return f"file {str(error.filename)!r}: {error.strerror}; check the path, its permissions and the disk"
    return f"the system refused: {error}"


def main(args: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 a check failed, 2 wrong input or a run that cannot go on, 130 interrupted, 141 not read."""
    arguments = sys.argv[1:] if args is None else args
    logging.getLogger("twofour").addHandler(logging.NullHandler())
    try:
        code: Any = twofour.main(arguments, prog_name="twofour", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except (click.Abort, KeyboardInterrupt):
        resumable = bool(arguments) and arguments[0] in RESUMABLE
        click.echo(f"twofour: interrupted{'; the same command with --resume goes on' if resumable else ''}", err=True)
        sys.exit(130)
    except click.ClickException as error:
        # click lists the choices of a missing argument one a line.
        click.echo(f"twofour: {' '.join(error.format_message().split())}", err=True)
        sys.exit(2)
    except (TwofourError, OSError, MemoryError) as error:
        if "--debug" in arguments:
            raise
        click.echo(f"twofour: {sentence_of(error)}", err=True)
        sys.exit(1 if isinstance(error, VerificationError) else 2)
