"""Processes whose system calls are recorded, refused or cut short, for the tests of faults."""

import ctypes
import mmap
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

# Every read and write of libc transfers only a part of its buffer.
_SHORT = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <unistd.h>
#define SHORT_AT(name, data) \
    ssize_t name(int file, data buffer, size_t size, off64_t offset) { \
        static ssize_t (*real)(int, data, size_t, off64_t); \
        if (!real) real = dlsym(RTLD_NEXT, #name); \
        return real(file, buffer, size > 1 ? size / 2 : size, offset); \
    }
#define SHORT(name, data) \
    ssize_t name(int file, data buffer, size_t size) { \
        static ssize_t (*real)(int, data, size_t); \
        if (!real) real = dlsym(RTLD_NEXT, #name); \
        return real(file, buffer, size > 1 ? size / 2 : size); \
    }
SHORT_AT(pwrite64, const void *)
SHORT_AT(pread64, void *)
SHORT(write, const void *)
SHORT(read, void *)
"""


def traced(script: str, arguments: Sequence[object], *options: str) -> subprocess.CompletedProcess[str]:
    """Run a script under strace with these options."""
    done = subprocess.run(
        [strace(), "-f", "-qq", *options, sys.executable, "-c", script, *map(str, arguments)],
        env={**os.environ, "PYTHONHASHSEED": "0", "VMSNAP_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if "ptrace" in done.stderr:
        pytest.skip(f"strace may not trace here: {done.stderr}")
    return done


def strace() -> str:
    program = shutil.which("strace")
    if program is None:
        pytest.skip("there is no strace")
    return program


@dataclass(frozen=True)
class Ended:
    """How a traced process ended: its exit status, negative for a signal, and the text of its exception."""

    pid: int
    status: int
    error: str


def traced_children(actions: Sequence[Callable[[], object]], folder: Path, *options: str) -> list[Ended]:
    """Call each in a process of its own, one after the other, under one strace.

    strace counts the system calls of each process on its own, so it breaks all of them at their Nth call of a name. The
    process that forks them is traced, too. So it only forks and waits, and reports through memory.
    """
    memory = mmap.mmap(-1, mmap.PAGESIZE)
    files = [os.open(folder / f"error {number}", os.O_RDWR | os.O_CREAT) for number in range(len(actions))]
    # strace is not an ancestor of it, and Yama allows only those.
    allow = ctypes.CDLL(None).prctl
    parent = os.fork()
    if parent == 0:
        try:
            allow(0x59616D61, ctypes.c_ulong(-1 & (1 << 64) - 1), 0, 0, 0)  # PR_SET_PTRACER, anybody
            os.kill(os.getpid(), signal.SIGSTOP)
            for number, action in enumerate(actions):
                child = os.fork()
                if child == 0:
                    _call(action, files[number])
                status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
                struct.pack_into("ii", memory, 8 * number, child, status)
        finally:
            os._exit(0)
    try:
        assert os.WIFSTOPPED(os.waitpid(parent, os.WUNTRACED)[1])
        command = [strace(), "-f", "-qq", *options, "-p", str(parent)]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as tracer:
            while not _is_traced(parent):
                if tracer.poll() is not None:
                    assert tracer.stderr is not None
                    pytest.skip(f"strace may not trace here: {tracer.stderr.read()}")
                time.sleep(0.001)
            os.kill(parent, signal.SIGCONT)
            _, complaints = tracer.communicate()
    finally:
        os.kill(parent, signal.SIGKILL)
        os.waitpid(parent, 0)
    ended = []
    for number, file in enumerate(files):
        child, status = struct.unpack_from("ii", memory, 8 * number)
        assert child, complaints
        with open(file, "rb") as text:
            ended.append(Ended(child, status, text.read().decode()))
        (folder / f"error {number}").unlink()
    return ended


def _call(action: Callable[[], object], errors: int) -> None:
    status = 1
    try:
        action()
        status = 0
    except BaseException as error:
        os.pwrite(errors, f"{type(error).__name__}: {error}".encode(), 0)
    finally:
        os._exit(status)


def _is_traced(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    return "\nTracerPid:\t0\n" not in status


def short_transfers(folder: Path) -> str:
    """Return the option of strace that loads a library which halves every read and write."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    source, library = folder / "short.c", folder / "short.so"
    source.write_text(_SHORT)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return f"-ELD_PRELOAD={library}"
