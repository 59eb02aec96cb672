"""The help of the command line: sections, arguments, examples that parse, and exit codes."""

import re
import shlex
from collections.abc import Iterator

import click
import pytest
from commands import run
from vmsnap.cli.command import Argument, Command
from vmsnap.cli.group import group

SECTIONS = ("Snapshot", "Guest memory", "QEMU", "Object stores", "Keys", "Maintenance")


def commands(of: click.Group, *names: str) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name, command in of.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, *names, name)
        else:
            yield (*names, name), command


COMMANDS = dict(commands(group))


def test_every_command_is_in_one_section_with_a_whole_sentence() -> None:
    text = run("--help").stdout.decode()
    assert re.findall(r"^([A-Z][A-Za-z ]+):$", text, re.MULTILINE) == ["Options", *SECTIONS]
    lines = re.findall(r"^  ([a-z][a-z -]*[a-z])  +([A-Z].*)$", text, re.MULTILINE)
    assert [tuple(name.split()) for name, _ in lines] == list(COMMANDS)
    for name, sentence in lines:
        assert sentence.endswith("."), name
        assert not sentence.endswith("..."), name


@pytest.mark.parametrize("name", COMMANDS, ids=" ".join)
def test_the_help_of_a_command_describes_everything(name: tuple[str, ...]) -> None:
    command = COMMANDS[name]
    assert isinstance(command, Command)
    text = run(*name, "--help").stdout.decode()
    for parameter in command.params:
        if isinstance(parameter, click.Argument):
            assert isinstance(parameter, Argument)
            assert parameter.description.endswith((".", "]")), parameter.name
            assert f"  {parameter.human_readable_name}  " in text
        else:
            assert isinstance(parameter, click.Option)
            assert parameter.help, parameter.name
    assert text.partition("\nExamples:\n")[2].splitlines() == [f"  {example}" for example in command.examples]
    assert all(len(line) <= 80 or line.startswith("  vmsnap ") for line in text.splitlines())


@pytest.mark.parametrize("name", COMMANDS, ids=" ".join)
def test_the_examples_of_a_command_parse(name: tuple[str, ...]) -> None:
    command = COMMANDS[name]
    assert isinstance(command, Command)
    assert len(command.examples) >= 2
    for example in command.examples:
        [found] = re.findall(r"vmsnap [^|)#>]*", example)
        words = shlex.split(found)[1:]
        assert tuple(words[: len(name)]) == name
        # Raises an error of usage if an option does not exist, or an argument is missing or too many.
        command.make_context(" ".join(name), words[len(name) :])


@pytest.mark.parametrize("old", ["dump-memory", "restore-memory", "cp"])
def test_there_is_one_name_for_a_command(old: str) -> None:
    assert b"No such command" in run(old, status=2).stderr
