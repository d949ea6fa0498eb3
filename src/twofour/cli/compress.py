"""`twofour compress`."""

import re
from pathlib import Path
from typing import Any

import click

from twofour.cli import options


@click.command()
@options.model_argument
@options.data_option
@options.weights_option
@options.recipe_option
@click.option("--out", type=options.PATH, help="Output folder; by default runs/MODEL-DATA.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier run in the output folder.")
@options.resume_option
@click.option("--epochs", type=click.IntRange(1, 2**31), help="Replaces the recipe's number of epochs.")
@click.option("--seed", type=click.IntRange(0, 2**31), default=0, show_default=True, help="First seed.")
@click.option("--seeds", type=click.IntRange(1, 2**31), default=1, show_default=True, help="Number of seeds; files come from the first.")
@options.method_option
@options.permute_option
@options.include_option
@options.exclude_option
@click.option(
    "--device",
    default="cpu",
    show_default=True,
    help="Where to train and what to build the engines for: cpu, cuda, cuda:N, or auto: a GPU if there is one.",
)
@options.workers_option
@options.skip_bad_option
@click.option("--json", "as_json", is_flag=True, help="Print events as JSON, one a line, instead of progress and table.")
@click.option("--quiet", is_flag=True, help="Print the table only.")
def command(model: str, data: str, out: Path | None, as_json: bool, quiet: bool, **asked: Any) -> int:
    """Dense network in; 2:4 network, engine and report out.

    MODEL is demo, torchvision:NAME, timm:NAME, hf:NAME_OR_DIR or FILE.py:FUNCTION; --data is digits, imagefolder:DIR, cifar10:DIR or
    FILE.py:FUNCTION. Trains the dense network unless --weights brings it, prunes it to 2:4, repeats the training with the mask held,
    checks, exports, builds, measures and reports, dense beside sparse.

    Exits with 1 when the run is done and its report holds a check that failed.

    A run that was stopped (Ctrl-C, a killed process, a full disk) goes on with --resume from its last complete epoch.
    """
    from twofour.cli.console import make_console, say
    from twofour.cli.progress import ProgressDisplay, print_events
    from twofour.compress import compress
    from twofour.errors import InputError
    from twofour.report.terminal import print_summary

    if as_json and quiet:
        raise InputError("compress: both --json and --quiet were given, expected one of them")
    folder = out or Path("runs") / re.sub(r"[^\w.-]+", "_", f"{model}-{data}")
    request = {**asked, "out": folder, "command": options.command_line()}
    if as_json:
        return int(bool(print_events(lambda listener: compress(model, data, listener=listener, **request)).failed_checks))
    console = make_console()
    if quiet:
        done = compress(model, data, **request)
        print_summary(done.report, console)
        return int(bool(done.failed_checks))
    with ProgressDisplay(console) as listener:
        done = compress(model, data, listener=listener, **request)
    print_summary(done.report, console)
    say(console, f"Report: {done.out / 'report.html'}")
    return int(bool(done.failed_checks))
