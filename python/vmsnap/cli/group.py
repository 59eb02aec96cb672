"""The command ``vmsnap``: its subcommands, and how an error of any of them is reported."""

import signal
import sys
from types import FrameType

import click

import vmsnap
from vmsnap.cli.demo import demo
from vmsnap.cli.dump import dump
from vmsnap.cli.failure import CommandError, describe
from vmsnap.cli.look import cat, ls


def _print_version(context: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    if wanted:
        click.echo(f"vmsnap {vmsnap.__version__} (aead: {vmsnap.aead_provider()})")
        context.exit()


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--version", is_flag=True, expose_value=False, callback=_print_version, help="Show the version.")
def group() -> None:
    """Store virtual machines' memory in encrypted snapshots that read at random.

    A key is 32 random bytes. This makes a file with a new one:

    \b
    (umask 077; python -c "import sys, vmsnap;
    sys.stdout.buffer.write(vmsnap.generate_key())" > vm.key)
    """  # noqa: D301  the \\b is for click: it leaves the lines after it as they are


for command in (dump, ls, cat, demo):
    group.add_command(command)


def _exit_by_signal(number: int, _frame: FrameType | None) -> None:
    sys.exit(128 + number)


def run() -> int:
    """Run the command line and return its exit status.

    Returns
    -------
    int
        0; 1 after an error; 2 after a wrong use; 130 after Ctrl-C.
    """
    # A stopped process must go on, and a half-written folder go, when the terminal is closed, too. A signal that is
    # ignored, as by nohup, stays so.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, _exit_by_signal)
    try:
        # None from a command, a status from click's own exits.
        return group.main(prog_name="vmsnap", standalone_mode=False) or 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort:
        return 128 + signal.SIGINT
    except (vmsnap.VmsnapError, CommandError, OSError) as error:
        click.echo(f"vmsnap: error: {describe(error)}", err=True)
        return 1
