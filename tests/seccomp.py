"""System calls that a sandbox refuses: code for a process that is to live with that, to be put before its own."""

import platform

# asm/unistd.h.
_NUMBERS = {
    "x86_64": {"pread64": 17, "socket": 41, "ptrace": 101, "process_vm_readv": 310},
    "aarch64": {"pread64": 67, "socket": 198, "ptrace": 117, "process_vm_readv": 270},
}

_FILTER = """
import ctypes, struct
def refuse(errno, numbers):
    # Loads the number of the call; for each that is refused, jumps over nothing to the refusal; all else passes.
    code = [(0x20, 0, 0, 0)]
    for number in numbers:
        code += [(0x15, 0, 1, number), (0x06, 0, 0, 0x00050000 | errno)]
    code.append((0x06, 0, 0, 0x7FFF0000))
    filters = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *each) for each in code))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(code), ctypes.addressof(filters)))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
    # PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP.
    for arguments in ((38, 1, 0, 0, 0), (22, 2, ctypes.addressof(program), 0, 0)):
        if prctl(*arguments):
            raise OSError(ctypes.get_errno(), "no filter of system calls can be set")
"""


def refusing(errno: int, *names: str) -> str:
    """Return Python that makes these system calls fail in the thread that runs it, and in those that it starts."""
    numbers = [_NUMBERS[platform.machine()][name] for name in names]
    return f"{_FILTER}\nrefuse({errno}, {numbers})\n"
