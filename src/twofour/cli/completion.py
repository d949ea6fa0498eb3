"""`twofour completion`."""

import click
from click.shell_completion import BashComplete, FishComplete, ShellComplete, ZshComplete

VARIABLE = "_TWOFOUR_COMPLETE"

# NOTE: bash splits words at colons, which are part of our names: the words are taken from the line itself, and what stands before the
# last colon is taken off the replies again, because bash replaces only what follows it.
BASH = """\
%(complete_func)s() {
    local line="${COMP_LINE:0:COMP_POINT}" words word prefix response type value
    read -ra words <<< "$line"
    [[ "$line" == *[[:space:]] ]] && words+=("")
    word="${words[${#words[@]}-1]}"
    prefix=""
    [[ "$word" == *:* && "$COMP_WORDBREAKS" == *:* ]] && prefix="${word%%:*}:"
    response=$(env COMP_WORDS="${words[*]}" COMP_CWORD=$((${#words[@]} - 1)) %(complete_var)s=bash_complete $1)
    COMPREPLY=()
    while IFS="," read -r type value; do
        if [[ $type == "dir" || $type == "file" ]]; then
            compopt -o default
        elif [[ $type == "plain" ]]; then
            [[ "$value" == *[:/] ]] && compopt -o nospace
            COMPREPLY+=("${value#"$prefix"}")
        fi
    done <<< "$response"
    return 0
}
%(complete_func)s_setup() {
    complete -o nosort -F %(complete_func)s %(prog_name)s
}
%(complete_func)s_setup;
"""


class ColonBash(BashComplete):
    """Bash's completion for names with colons in them."""

    source_template = BASH

    @staticmethod
    def _check_version() -> None:
        """The script above needs nothing newer than bash 4.4; asking which bash there is would start one."""


SHELLS: dict[str, type[ShellComplete]] = {"bash": ColonBash, "zsh": ZshComplete, "fish": FishComplete}


@click.command()
@click.argument("shell", type=click.Choice(list(SHELLS)))
def command(shell: str) -> None:
    """Print the script that lets SHELL complete sub-commands, options and names.

    For bash: `eval "$(twofour completion bash)"` in ~/.bashrc; zsh the same in ~/.zshrc; for fish:
    `twofour completion fish > ~/.config/fish/completions/twofour.fish`.
    """
    from twofour.cli.group import twofour

    click.echo(SHELLS[shell](twofour, {}, "twofour", VARIABLE).source())
