"""A guest that boots in well under a second, and that knows its memory: tests/programs/toy_guest.s says how."""

import functools
import re
import struct
import subprocess
import tempfile
from pathlib import Path

import pytest
from guest import Console
from support import MIB

_SOURCE = Path(__file__).resolve().parent / "programs/toy_guest.s"
_LOADED_AT = MIB
# After the header of Multiboot, which is 8 words.
_PARAMETERS_AT = 32
_TIMER_HZ = 3_579_545
# QEMU puts what a Multiboot kernel is told behind it.
_FIRST = 2 * MIB


@functools.cache
def _program() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        parts = f"{folder}/toy.o", f"{folder}/toy"
        link = ["ld", "-m", "elf_i386", "-Ttext", hex(_LOADED_AT), "--oformat", "binary", "-o", parts[1], parts[0]]
        try:
            subprocess.run(["as", "--32", "-o", parts[0], _SOURCE], check=True, capture_output=True, text=True)
            subprocess.run(link, check=True, capture_output=True, text=True)
        except FileNotFoundError as error:
            pytest.skip(f"there is no {error.filename} to assemble a guest with: apt install binutils")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"a guest for x86 cannot be assembled: {error.stderr.strip()}")
        return Path(parts[1]).read_bytes()


class Toy(Console):
    """The toy guest and its serial console, which goes on where one QEMU ends and another loads the guest.

    It holds data from 2 MiB on: `still_mib` that it only checks, and `moving_mib` that it rewrites in each round. A
    round has `steps` of at least `period_ms`; each checks one of `still_parts` of the data that stay as they are. A
    guest without a pause fills the pipe of its console, and then waits until somebody reads it.
    """

    def __init__(
        self,
        folder: Path,
        name: str = "toy",
        *,
        still_mib: int = 4,
        moving_mib: int = 4,
        steps: int = 1,
        still_parts: int = 1,
        period_ms: float = 20,
    ) -> None:
        super().__init__(folder, name)
        moving = _FIRST + still_mib * MIB
        end = moving + moving_mib * MIB
        still_step, moving_step = still_mib * MIB // still_parts, moving_mib * MIB // steps
        assert (still_step * still_parts, moving_step * steps) == (still_mib * MIB, moving_mib * MIB)
        # Words are in groups of 16 bytes.
        assert still_step % 16 == moving_step % 16 == 0
        # Devices lie below 4 GiB.
        assert end <= 3 << 30
        ticks = round(period_ms * _TIMER_HZ / 1000)
        # The timer has 24 bits.
        assert ticks < 1 << 23
        program = bytearray(_program())
        struct.pack_into("<6I", program, _PARAMETERS_AT, _FIRST, moving, end, still_step, moving_step, ticks)
        self._kernel = folder / f"{name}.kernel"
        self._kernel.write_bytes(program)
        self.number: int | None = None

    @property
    def options(self) -> list[str]:
        """Options for a QEMU with this guest."""
        return ["-serial", f"pipe:{self.path}", "-kernel", str(self._kernel)]

    def tick(self) -> int:
        """Wait for the next number. It must follow the last one, and the guest must find its memory as it left it."""
        found = None
        while found is None:
            line = self.line()
            assert not line.startswith(b"bad "), f"the guest found other memory than it wrote: {line!r}"
            found = re.fullmatch(rb"tick ([0-9a-f]{8})", line)
        number = int(found[1], 16)
        assert self.number is None or number == self.number + 1, f"{number} comes after {self.number}"
        self.number = number
        return number

    def ticks(self, count: int) -> list[int]:
        """Wait for some numbers."""
        return [self.tick() for _ in range(count)]

    def follow(self, other: "Toy") -> None:
        """Expect the number after the last one that a QEMU that has ended printed to another console."""
        other.catch_up()
        self.number, self._rest = other.number, other._rest

    def goes_on(self) -> None:
        """Wait for numbers that the guest has not printed yet: it runs, and finds its memory as it left it."""
        self.catch_up()
        self.ticks(10)

    def catch_up(self) -> None:
        """Read all numbers that the guest has printed, without waiting for one."""
        while self.has_line():
            self.tick()
