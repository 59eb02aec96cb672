"""Locations of snapshots: local paths, and URLs in object stores."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from vmsnap.errors import InvalidArgumentError

if TYPE_CHECKING:
    from _typeshed import StrOrBytesPath

    from vmsnap._vmsnap import _Located

__all__ = ["Location"]

# A URL, also as pathlib shortens it: Path("s3://bucket/vm1") is s3:/bucket/vm1. These are the schemes that a str names.
_URL = re.compile(r"(?:s3a?|gs|az|abfss|memory|file|https?):/+[^/]", re.IGNORECASE)


@dataclass(frozen=True, repr=False)
class Location:
    """A snapshot in an object store, with options for the connection.

    Accepted wherever the path of a snapshot is. A plain ``str`` such as ``"s3://bucket/vm1"`` is enough if the
    environment variables of the store (``AWS_REGION`` and others) say everything, or the defaults do.

    >>> import vmsnap
    >>> options = {"endpoint": "https://s3.example.org", "secret_access_key": "secret"}
    >>> vmsnap.Location("s3://bucket/vm1", storage_options=options, connections=32)
    Location('s3://bucket/vm1', storage_options={'endpoint': ..., 'secret_access_key': ...}, connections=32)

    Attributes
    ----------
    url
        The URL: ``s3://bucket/path``, ``gs://bucket/path`` or ``az://container/path``. Or a local path, for which the
        options have no meaning.
    storage_options
        Options of the client, such as ``region`` or ``endpoint``, by the names that the Rust crate ``object_store``
        gives them. They override the environment variables.
    cache
        A directory for fetched data, so that it is not fetched again: at most 10 GiB, or a tenth of the free space.
        Encrypted data stays encrypted there. By default nothing is kept.
    connections
        The most requests that are under way at once, from 1 to 256.
    allow_http
        Whether requests may go to another machine without TLS. A loopback address never needs TLS.

    Notes
    -----
    The values of `storage_options` may be secrets, so `repr` does not show them. **A pickle contains them in the
    clear**, as the pickle of a reader contains them and the data key.
    """

    url: str
    storage_options: Mapping[str, str] = field(default_factory=dict, hash=False)
    cache: "StrOrBytesPath | None" = None
    connections: int = 16
    allow_http: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.url, str):
            raise TypeError(f"the URL of a Location must be a str, not {type(self.url).__name__}")
        options = dict(self.storage_options or {})
        for name, value in options.items():
            if not isinstance(name, str) or not isinstance(value, str):
                # The value may be a secret.
                raise TypeError(f"storage options must be str: {name!r} is not")
        object.__setattr__(self, "storage_options", options)

    def __str__(self) -> str:
        return self.url

    def __repr__(self) -> str:
        shown = [repr(self.url)]
        if self.storage_options:
            shown.append("storage_options={" + ", ".join(f"{name!r}: ..." for name in self.storage_options) + "}")
        if self.cache is not None:
            shown.append(f"cache={os.fsdecode(self.cache)!r}")
        if self.connections != 16:
            shown.append(f"connections={self.connections!r}")
        if self.allow_http:
            shown.append("allow_http=True")
        return f"Location({', '.join(shown)})"


# Functions take these as the location of a snapshot.
SnapshotLocation: TypeAlias = "StrOrBytesPath | Location"


def located(given: SnapshotLocation) -> "_Located":
    """Return a location in the form that the core takes. A str may be a URL; a path and bytes are local.

    Raises
    ------
    InvalidArgumentError
        A path object has the text of a URL.
    """
    if isinstance(given, Location):
        cache = None if given.cache is None else os.fsdecode(given.cache)
        return given.url, given.storage_options, cache, given.connections, given.allow_http
    if isinstance(given, str):
        return given
    text = os.fsdecode(given)
    if not isinstance(given, bytes) and _URL.match(text):
        raise InvalidArgumentError(
            f"the path {text!r} looks like a URL, which a path object cannot hold: pass the URL as a str"
        )
    # Bytes that look like a URL name a local file.
    return os.path.join(os.curdir, text) if _URL.match(text) else text


def has_scheme(text: str) -> bool:
    """Return whether a text begins as a URL. A ``file`` URL is a local path."""
    return "://" in text[:8] and _URL.match(text) is not None


def is_url(given: SnapshotLocation) -> bool:
    """Return whether a location is in an object store."""
    text = str(given) if isinstance(given, (str, Location)) else ""
    return has_scheme(text) and not text.lower().startswith("file:")


def local_path(location: str) -> Path | None:
    """Return the location of an opened snapshot as a path; None for a URL."""
    return None if is_url(location) else Path(location)
