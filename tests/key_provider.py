"""A key service as a test uses it: the process, and the provider that speaks to it."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PROGRAM = Path(__file__).parent / "programs/key_service.py"


@dataclass
class SocketProvider:
    """Asks the process at a socket."""

    path: Path
    name: str = "socket-service"
    timeout_seconds: float = 10

    def wrap(self, payload: bytes) -> bytes:
        return self._ask(b"wrap " + payload)

    def unwrap(self, wrapped: bytes) -> bytes:
        return self._ask(b"unwrap " + wrapped)

    def _ask(self, request: bytes) -> bytes:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(self.path))
            client.sendall(request)
            client.shutdown(socket.SHUT_WR)
            answer = b""
            while piece := client.recv(65536):
                answer += piece
        status, _, content = answer.partition(b" ")
        if status != b"ok":
            raise PermissionError(f"the service said {answer.decode()!r}")
        return content


@contextmanager
def key_service(folder: Path, behaviour: str = "good") -> Iterator[Path]:
    """Run the service; gives its socket."""
    path = folder / f"{behaviour}.socket"
    with subprocess.Popen([sys.executable, PROGRAM, path, behaviour]) as process:
        try:
            for _ in range(1000):
                if path.exists():
                    break
                time.sleep(0.01)
            yield path
        finally:
            process.kill()
