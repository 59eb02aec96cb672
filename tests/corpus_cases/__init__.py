"""The cases of tests/corpus, a module for each part of a snapshot that they are about."""

from collections.abc import Callable

from .archives import add_archives
from .case import Corpus
from .fragments import add_fragments
from .keys import add_key_files, add_payloads, add_wrapped
from .manifests import add_beside, add_manifests
from .memories import add_memories
from .sound import add_sound

#: In this order: some cases are others, changed.
PARTS: list[Callable[[Corpus], None]] = [
    add_sound,
    add_payloads,
    add_key_files,
    add_wrapped,
    add_fragments,
    add_manifests,
    add_beside,
    add_memories,
]
#: Cases that are archives, of the cases above.
ARCHIVES: list[Callable[[Corpus], None]] = [add_archives]

__all__ = ["ARCHIVES", "PARTS", "Corpus"]
