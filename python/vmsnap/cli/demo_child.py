"""The child of ``vmsnap demo``: holds memory until its standard input ends. Run by its path, it needs only Python."""

import ctypes
import hashlib
import json
import mmap
import os
import random
import signal
import sys

_PR_SET_PDEATHSIG = 1
_LONGEST_RUN_PAGES = 64
_WORDS = b"the page table of a guest holds all its kernel last wrote there: logs, strings, names and paths ".split()


def fill(memory: mmap.mmap) -> None:
    """Fill memory like a guest's, in runs of pages: a quarter each untouched, zero, text and random."""
    dice = random.Random(0)
    text = b" ".join(dice.choices(_WORDS, k=_LONGEST_RUN_PAGES * mmap.PAGESIZE))
    position = 0
    while position < len(memory):
        size = min(dice.randint(1, _LONGEST_RUN_PAGES) * mmap.PAGESIZE, len(memory) - position)
        match dice.randrange(4):
            case 0:
                pass
            case 1:
                memory[position : position + size] = bytes(size)
            case 2:
                at = dice.randrange(len(text) - size)
                memory[position : position + size] = text[at : at + size]
            case _:
                memory[position : position + size] = os.urandom(size)
        position += size


def hold(size: int) -> None:
    """Map and fill `size` bytes, print their address and digest, and wait."""
    # The kernel ends it with its parent, even if it is stopped and the parent was killed.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        fill(memory)
        place = ctypes.c_char.from_buffer(memory)
        told = {"address": ctypes.addressof(place), "sha256": hashlib.sha256(memory).hexdigest()}
        print(json.dumps(told), flush=True)
        sys.stdin.read()
        del place


def main() -> None:
    """Hold the number of bytes that the argument says."""
    try:
        hold(int(sys.argv[1]))
    except (OSError, MemoryError) as error:
        sys.exit(f"vmsnap: the child: {error}")


if __name__ == "__main__":
    main()
