"""Locations of snapshots as arguments, and the options for object stores."""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any, TypeAlias

import click

from vmsnap.cli.command import StoreOption, with_options
from vmsnap.cli.names import as_name
from vmsnap.cli.paths import PATH
from vmsnap.location import Location, has_scheme, is_url

# A location on the command line.
Snapshot: TypeAlias = Path | Location

_Command = Callable[..., Any]

# Other users can see the command line. These are in the names of all options of object_store that hold secrets.
_SECRET = re.compile(r"secret|token$|_key$|^key$|sas|password|service_account_key")


class _SnapshotType(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.4 only
    """A path that is not empty, or a URL."""

    name = "snapshot"

    def convert(self, value: object, parameter: click.Parameter | None, context: click.Context | None) -> Snapshot:
        if isinstance(value, (Path, Location)):
            return value
        text = str(value)
        if has_scheme(text):
            return Location(as_name(text))
        return Path(os.fsdecode(PATH.convert(text, parameter, context)))


class _UrlType(_SnapshotType):
    """A URL in an object store."""

    name = "URL"

    def convert(self, value: object, parameter: click.Parameter | None, context: click.Context | None) -> Location:
        found = super().convert(value, parameter, context)
        if isinstance(found, Location) and is_url(found):
            return found
        text = f"{value} is not a URL such as s3://bucket/vm1, gs://bucket/vm1 or az://container/vm1"
        raise click.BadParameter(text, context, parameter)


class _StorageOption(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.4 only
    """NAME=VALUE, an option of the client. It must not be a secret."""

    name = "storage option"

    def convert(
        self, value: object, parameter: click.Parameter | None, context: click.Context | None
    ) -> tuple[str, str]:
        name, equals, option = as_name(str(value)).partition("=")
        if not name or not equals:
            self.fail("it must be NAME=VALUE, as in endpoint=https://s3.example.org", parameter, context)
        if _SECRET.search(name.lower()):
            self.fail(
                f"{name} is a secret, and other users can see the command line: set the variable of the environment "
                "instead, such as AWS_SECRET_ACCESS_KEY",
                parameter,
                context,
            )
        return name, option


SNAPSHOT = _SnapshotType()
URL = _UrlType()

_CACHE_OPTIONS = [
    click.option(
        "--cache",
        cls=StoreOption,
        type=PATH,
        metavar="DIR",
        envvar="VMSNAP_CACHE",
        help="Keep fetched data in this directory, still encrypted; VMSNAP_CACHE names another one.  [default: "
        "$XDG_CACHE_HOME/vmsnap]",
    ),
    click.option("--no-cache", cls=StoreOption, is_flag=True, help="Keep no fetched data."),
]
_CONNECTION_OPTIONS = [
    click.option(
        "--storage-option",
        "storage_options",
        cls=StoreOption,
        type=_StorageOption(),
        multiple=True,
        metavar="NAME=VALUE",
        help="An option of the connection, such as region=eu-west-1 or endpoint=URL. May be repeated.",
    ),
    click.option(
        "--allow-http",
        cls=StoreOption,
        is_flag=True,
        help="Allow requests to another machine without TLS.",
    ),
]


def cache_directory(given: Path | None) -> Path:
    """Return the directory of the cache: the given one, or the user's."""
    if given is not None:
        return given
    # XDG: a path that is not absolute is ignored.
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (named if named.is_absolute() else Path("~/.cache").expanduser()) / "vmsnap"


def _with_options(command: _Command, options: Sequence[Callable[[_Command], _Command]]) -> _Command:
    @wraps(command)
    def wrapped(**arguments: Any) -> Any:
        cache, is_uncached = arguments.pop("cache", None), arguments.pop("no_cache", True)
        given = {
            "storage_options": dict(arguments.pop("storage_options")),
            "allow_http": arguments.pop("allow_http"),
            "cache": None if is_uncached else cache_directory(cache),
        }
        for name, value in arguments.items():
            if isinstance(value, Location):
                arguments[name] = replace(value, **given)
        return command(**arguments)

    return with_options(options, wrapped)


def store_options(command: _Command) -> _Command:
    """Give a command that reads the options for object stores, which all its locations get."""
    return _with_options(command, [*_CACHE_OPTIONS, *_CONNECTION_OPTIONS])


def new_store_options(command: _Command) -> _Command:
    """Give a command that does not read at random the options for object stores, which all its locations get."""
    return _with_options(command, _CONNECTION_OPTIONS)


def local_path(location: Snapshot) -> Path | None:
    """Return the path of a location; None for a URL."""
    return location if isinstance(location, Path) else None
