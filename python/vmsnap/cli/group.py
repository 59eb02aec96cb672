"""The command ``vmsnap``: its subcommands, and how an error of any of them is reported."""

import signal
import sys
import warnings
from types import FrameType

import click

import vmsnap
from vmsnap.cli.completion import completion
from vmsnap.cli.convert import decrypt, encrypt
from vmsnap.cli.copy import cp
from vmsnap.cli.demo import demo
from vmsnap.cli.dump import dump
from vmsnap.cli.failure import CommandError, describe, status_of
from vmsnap.cli.info import info
from vmsnap.cli.keys import show_warning
from vmsnap.cli.look import cat, ls
from vmsnap.cli.map import map_memory
from vmsnap.cli.memory import dump_memory, peek, restore_memory
from vmsnap.cli.qemu import qemu
from vmsnap.cli.rewrap import keygen, rekey
from vmsnap.cli.seals import clean, seal, verify
from vmsnap.cli.show import show
from vmsnap.cli.streams import ReaderGoneError
from vmsnap.cli.terminal import printable
from vmsnap.cli.tree import tree

_EXIT_CODES = """\b
Exit codes:
  0    all went well
  1    an error that is none of those below
  2    wrong use
  3    the key is missing or wrong, or what is stored is not authentic
  4    the snapshot is damaged, or of a format not supported
  130  interrupted by Ctrl-C (128 and the signal's number, as after others)
  141  whoever read the output went away
"""


def _print_version(context: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    if wanted:
        build = vmsnap.build_info()
        built = f"aead: {vmsnap.aead_provider()}; features: {', '.join(build.features)}"
        click.echo(f"vmsnap {build.version} ({built}; commit: {build.commit or 'unknown'})")
        context.exit()


class _Commands(click.Group):
    """Commands in the order in which they were added."""

    def list_commands(self, _context: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]}, epilog=_EXIT_CODES)
@click.option("--version", is_flag=True, expose_value=False, callback=_print_version, help="Show the version.")
def group() -> None:
    """Store virtual machines' memory in encrypted snapshots that read at random.

    What is encrypted opens with your own identity (~/.config/vmsnap/identity.txt, made when it is first needed), unless
    a command is told otherwise.
    """


for command in (
    info,
    tree,
    ls,
    show,
    cat,
    cp,
    dump,
    dump_memory,
    restore_memory,
    peek,
    map_memory,
    qemu,
    encrypt,
    decrypt,
    verify,
    seal,
    clean,
    keygen,
    rekey,
    demo,
    completion,
):
    group.add_command(command)


def _exit_by_signal(number: int, _frame: FrameType | None) -> None:
    sys.exit(128 + number)


def run() -> int:
    """Run the command line and return its exit status.

    Returns
    -------
    int
        As the help of the command says.
    """
    # A stopped process must go on, and a half-written folder go, when the terminal is closed, too. A signal that is
    # ignored, as by nohup, stays so.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, _exit_by_signal)
    warnings.showwarning = show_warning
    # That an identity must be kept is for whoever runs the command, whatever Python is told about warnings.
    warnings.filterwarnings("always", category=vmsnap.NewIdentityWarning)
    try:
        # None from a command, a status from click's own exits.
        status = group.main(prog_name="vmsnap", standalone_mode=False) or 0
        sys.stdout.flush()
        return status
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort:
        return 128 + signal.SIGINT
    except ReaderGoneError:
        return 128 + signal.SIGPIPE
    except (vmsnap.VmsnapError, CommandError, OSError, MemoryError, Warning) as error:
        click.echo(f"vmsnap: error: {describe(error)}", err=True)
        return status_of(error)
    except UnicodeEncodeError as error:
        # Names are looked at as arguments; this is whatever else was given to the library as text.
        click.echo(f"vmsnap: error: {printable(str(error.object))}: is not UTF-8", err=True)
        return 1
    except RecursionError:
        click.echo("vmsnap: error: it is nested too deeply to be shown", err=True)
        return 1
