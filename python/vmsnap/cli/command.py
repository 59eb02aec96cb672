"""Commands whose help describes their arguments and ends with examples."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

_Decorated = TypeVar("_Decorated", bound=Callable[..., Any] | click.Command)


class Argument(click.Argument):
    """An argument with a description, which the help of its command shows."""

    def __init__(
        self, param_decls: Sequence[str], required: bool | None = None, *, description: str, **attributes: Any
    ) -> None:
        super().__init__(param_decls, required=required, **attributes)
        self.description = description


def with_options(
    options: Sequence[Callable[[Callable[..., Any]], Callable[..., Any]]], command: Callable[..., Any]
) -> Callable[..., Any]:
    """Give a command options, in their order."""
    for option in reversed(options):
        command = option(command)
    return command


class StoreOption(click.Option):
    """An option that has a meaning only for a URL. The help lists it in a section of its own."""


class Command(click.Command):
    """A command whose help lists its arguments and its options, and ends with examples."""

    def __init__(self, *arguments: Any, examples: Sequence[str], **attributes: Any) -> None:
        super().__init__(*arguments, **attributes)
        self.examples = examples

    def format_help(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the whole help: click itself describes arguments only since version 8.5."""
        self.format_usage(context, formatter)
        self.format_help_text(context, formatter)
        arguments = [each for each in self.params if isinstance(each, Argument)]
        if arguments:
            with formatter.section("Arguments"):
                formatter.write_dl([(each.human_readable_name, each.description) for each in arguments])
        options = [each for each in self.get_params(context) if isinstance(each, click.Option)]
        for title, is_for_stores in (("Options", False), ("Options for object stores", True)):
            chosen = [each for each in options if isinstance(each, StoreOption) == is_for_stores]
            if records := [record for each in chosen if (record := each.get_help_record(context))]:
                with formatter.section(title):
                    formatter.write_dl(records)
        with formatter.section("Examples"):
            for example in self.examples:
                formatter.write(f"{'':{formatter.current_indent}}{example}\n")


def argument(name: str, *, metavar: str, description: str, **attributes: Any) -> Callable[[_Decorated], _Decorated]:
    """Return a decorator that gives a command an argument with a description."""

    def decorate(command: _Decorated) -> _Decorated:
        # A new decorator for each command: those of click 8.1.0 forget the class after their first use.
        return click.argument(name, cls=Argument, metavar=metavar, description=description, **attributes)(command)

    return decorate
