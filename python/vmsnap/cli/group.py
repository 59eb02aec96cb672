"""The command ``vmsnap``: its subcommands, and how an error of any of them is reported."""

import signal
import sys
import warnings
from types import FrameType

import click

import vmsnap
from vmsnap.cli.cache import cache
from vmsnap.cli.cat import cat
from vmsnap.cli.clean import clean
from vmsnap.cli.completion import completion
from vmsnap.cli.convert import decrypt, encrypt
from vmsnap.cli.demo import demo
from vmsnap.cli.dump import dump
from vmsnap.cli.dump_process import dump_process
from vmsnap.cli.exchange import export, import_command
from vmsnap.cli.failure import CommandError, describe, status_of
from vmsnap.cli.get import get
from vmsnap.cli.info import info
from vmsnap.cli.keygen import keygen
from vmsnap.cli.keys import show_warning
from vmsnap.cli.ls import ls
from vmsnap.cli.map import map_memory
from vmsnap.cli.pack import pack, unpack
from vmsnap.cli.peek import peek
from vmsnap.cli.push import pull, push
from vmsnap.cli.put import put
from vmsnap.cli.qemu import qemu
from vmsnap.cli.rekey import rekey
from vmsnap.cli.restore import restore
from vmsnap.cli.rm import rm
from vmsnap.cli.seal import seal
from vmsnap.cli.show import show
from vmsnap.cli.streams import ReaderGoneError
from vmsnap.cli.terminal import printable
from vmsnap.cli.tree import tree
from vmsnap.cli.verify import verify

_EXIT_CODES = """\b
Exit codes:
  0    success
  1    other error
  2    usage error
  3    the key is missing or wrong, or the data is not authentic
  4    the snapshot is damaged, or of an unsupported format
  130  interrupted by Ctrl-C (128 + the number of the signal, for any signal)
  141  output pipe closed
"""

_SECTIONS: dict[str, tuple[click.Command, ...]] = {
    "Snapshot": (info, tree, ls, show, cat, get, put, pack, unpack),
    "Guest memory": (dump, restore, peek, map_memory, dump_process),
    "QEMU": (qemu, import_command, export),
    "Object stores": (push, pull, cache),
    "Keys": (keygen, rekey, encrypt, decrypt),
    "Maintenance": (verify, seal, clean, rm, demo, completion),
}


def _print_version(context: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    if wanted:
        build = vmsnap.build_info()
        built = f"aead: {vmsnap.aead_provider()}; features: {', '.join(build.features)}"
        click.echo(f"vmsnap {build.version} ({built}; commit: {build.commit or 'unknown'})")
        context.exit()


class _Commands(click.Group):
    """Commands in sections, in the order in which they were added."""

    def list_commands(self, _context: click.Context) -> list[str]:
        return list(self.commands)

    def format_commands(self, _context: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands by section. The commands of a group within have lines of their own."""
        sections = {
            title: [line for command in commands for line in _named(command)] for title, commands in _SECTIONS.items()
        }
        width = max(len(name) for lines in sections.values() for name, _ in lines)
        for title, lines in sections.items():
            with formatter.section(title):
                formatter.write_dl(
                    [
                        (f"{name:<{width}}", command.get_short_help_str(formatter.width - width - 6))
                        for name, command in lines
                    ]
                )


def _named(command: click.Command) -> list[tuple[str, click.Command]]:
    if isinstance(command, click.Group):
        return [(f"{command.name} {name}", each) for name, each in command.commands.items()]
    return [(str(command.name), command)]


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]}, epilog=_EXIT_CODES)
@click.option("--version", is_flag=True, expose_value=False, callback=_print_version, help="Show the version and exit.")
def group() -> None:
    """Store the memory and state of virtual machines in encrypted snapshots.

    A snapshot is a directory, or one file, or is in an object store: s3://bucket/vm1. An encrypted one opens with your
    own identity (~/.config/vmsnap/identity.txt, created when it is first needed) unless a key option says otherwise.
    "vmsnap COMMAND --help" describes a command.
    """


for _commands in _SECTIONS.values():
    for _command in _commands:
        group.add_command(_command)


def _exit_by_signal(number: int, _frame: FrameType | None) -> None:
    sys.exit(128 + number)


def run() -> int:
    """Run the command line and return its exit status.

    Returns
    -------
    int
        The exit code, as ``vmsnap --help`` lists them.
    """
    # A stopped process must continue, and an incomplete snapshot be removed, also when the terminal is closed. A signal
    # that is ignored, as nohup does, stays ignored.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, _exit_by_signal)
    warnings.showwarning = show_warning
    # The user must see that a new identity needs a backup, even if Python is set to ignore warnings.
    warnings.filterwarnings("always", category=vmsnap.NewIdentityWarning)
    try:
        # Commands return None, click's own exits return a status.
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
        # Arguments that are names were checked before: this is other text for the library.
        click.echo(f"vmsnap: error: {printable(str(error.object))} is not UTF-8", err=True)
        return 1
    except RecursionError:
        click.echo("vmsnap: error: the value is nested too deeply to be shown", err=True)
        return 1
