"""The local cache of data from object stores."""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmsnap import _vmsnap

if TYPE_CHECKING:
    from _typeshed import StrOrBytesPath

__all__: list[str] = []


@dataclass(frozen=True)
class CacheUsage:
    """The blocks in a cache.

    Attributes
    ----------
    blocks
        Their number.
    bytes
        The space that they occupy.
    limit_bytes
        The space that they may occupy: 10 GiB, or a tenth of the free space.
    """

    blocks: int
    bytes: int
    limit_bytes: int


def cache_usage(directory: "StrOrBytesPath") -> CacheUsage:
    """Count the blocks in the cache at a directory. If it does not exist, it has no blocks.

    Raises
    ------
    InvalidArgumentError
        Other users may write to the directory.
    OSError
        It cannot be read.
    """
    return CacheUsage(*_vmsnap.cache_usage(os.fsdecode(directory)))


def empty_cache(directory: "StrOrBytesPath") -> CacheUsage:
    """Remove all blocks from the cache at a directory, and return their number and size. This is safe at any time.

    Raises
    ------
    InvalidArgumentError
        Other users may write to the directory.
    OSError
        A block cannot be removed.
    """
    removed = _vmsnap.empty_cache(os.fsdecode(directory))
    return CacheUsage(*removed, limit_bytes=cache_usage(directory).limit_bytes)
