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
_WORDS = b"the page table of a guest holds what its kernel last wrote there: logs, strings, names and paths ".split()


def fill(memory: mmap.mmap) -> None:
    """Fill memory as a guest's is: in runs of pages, a quarter each never touched, zero, text and random bytes."""
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
    """Map and fill `size` bytes, tell where they are and their digest, and wait."""
    # Goes with its parent, even stopped and even if that is killed.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        fill(memory)
        place = ctypes.c_char.from_buffer(memory)
        told = {"address": ctypes.addressof(place), "sha256": hashlib.sha256(memory).hexdigest()}
        print(json.dumps(told), flush=True)
        sys.stdin.read()
        del place


def main() -> None:
    """Hold as many bytes as the command line says."""
    try:
        hold(int(sys.argv[1]))
    except (OSError, MemoryError) as error:
        sys.exit(f"vmsnap: the child: {error}")


if __name__ == "__main__":
    main()
