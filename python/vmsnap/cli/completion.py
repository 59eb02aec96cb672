"""``vmsnap completion``: a script that lets a shell complete commands, options, directories and fragments."""

import click
from click.shell_completion import get_completion_class

from vmsnap.cli.command import Command, argument


@click.command(
    cls=Command,
    examples=[
        'eval "$(vmsnap completion bash)"      # in ~/.bashrc',
        'eval "$(vmsnap completion zsh)"       # in ~/.zshrc, after compinit',
        "vmsnap completion fish | source       # in ~/.config/fish/config.fish",
    ],
)
@argument("shell", metavar="bash|zsh|fish", description="The shell.", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the completion script for a shell.

    The script completes commands, options, snapshots, fragments and namespaces. Names of fragments are visible without
    the key, so no key is asked for.
    """
    script = get_completion_class(shell)
    # click has one for each of these shells.
    assert script is not None
    root = context.find_root()
    click.echo(script(root.command, {}, "vmsnap", "_VMSNAP_COMPLETE").source())
