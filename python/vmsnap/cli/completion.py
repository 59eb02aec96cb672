"""``vmsnap completion``: the script by which a shell completes commands, options, folders and fragments."""

import click
from click.shell_completion import get_completion_class


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the completion script for a shell.

    \b
    bash    eval "$(vmsnap completion bash)"      in ~/.bashrc
    zsh     eval "$(vmsnap completion zsh)"       in ~/.zshrc, after compinit
    fish    vmsnap completion fish | source       in ~/.config/fish/config.fish

    Fragments complete without a key: their names show.
    """  # noqa: D301  the \\b is for click: it leaves the lines after it as they are
    script = get_completion_class(shell)
    # One of those that click has, by the choice above.
    assert script is not None
    root = context.find_root()
    click.echo(script(root.command, {}, "vmsnap", "_VMSNAP_COMPLETE").source())
