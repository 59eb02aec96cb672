"""An HTTP proxy of tests between a client and an object store: counts requests, slows them down, injects faults.

    with FaultProxy(bucket.endpoint) as proxy:
        proxy.latency_seconds = 0.02
        proxy.rule(Status(503, {"Retry-After": "1"}), kind="part", nth=2)
        client = bucket.at(proxy.endpoint).store()

It speaks HTTP/1.1, reads a whole request before it forwards it, and opens a connection to the server for each one.
Host and path go on as they came, because clients sign them. A client of S3 signs all other headers too: where a fault
changes one of those, the proxy signs the request again with `credentials`, an access key and a secret key.
"""

import http.client
import io
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import BinaryIO, Self
from urllib.parse import urlsplit

from aws_signature import sign_again
from http_faults import Answer, Fault, Headers, Request, ResetError, Rule

_PIECE_BYTES = 1 << 16


class FaultProxy:
    """A proxy on a free port of loopback, for the time of a `with` block."""

    def __init__(self, server: str, credentials: tuple[str, str] | None = None) -> None:
        address = urlsplit(server)
        assert address.hostname, server
        assert address.port, server
        self._server = (address.hostname, address.port)
        self._credentials = credentials
        #: Waited before a request is forwarded.
        self.latency_seconds = 0.0
        #: Bytes of bodies, of all connections in both directions together.
        self.bytes_per_second: float | None = None
        #: All requests so far, in the order in which they came.
        self.requests: list[Request] = []
        self._rules: list[Rule] = []
        self._lock = threading.Lock()
        self._free_at = 0.0
        self._closing = threading.Event()
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        with self._lock:
            for each in (self._listener, *self._sockets):
                _shut(each)
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def rule(
        self,
        fault: Fault,
        *,
        method: str | None = None,
        path: str | None = None,
        kind: str | None = None,
        nth: int = 1,
        times: int | None = 1,
    ) -> Rule:
        """Inject a fault; of several rules that are due, a request meets the first."""
        rule = Rule(fault, method, path, kind, nth, times)
        with self._lock:
            self._rules.append(rule)
        return rule

    def clear(self) -> None:
        """Forget all rules and requests."""
        with self._lock:
            self._rules.clear()
            self.requests.clear()

    def count(self, kind: str | None = None, path: str = "") -> int:
        """Return how many requests there were, of a kind and of paths in which a regular expression is found."""
        with self._lock:
            return sum(kind in (None, each.kind) and bool(re.search(path, each.path)) for each in self.requests)

    def round_trips(self) -> int:
        """Return the number of requests of the longest chain in which each began after the one before had ended."""
        trips, free_at = 0, 0.0
        with self._lock:
            ended = [(each.ended, each.began) for each in self.requests if each.ended is not None]
        for end, began in sorted(ended):
            if began >= free_at:
                trips, free_at = trips + 1, end
        return trips

    def _start(self, work: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                if self._closing.is_set():
                    client.close()
                    return
                self._sockets.add(client)
            self._start(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            with client.makefile("rb") as incoming:
                while (request := self._read(client, incoming)) is not None:
                    if not self._exchange(client, request):
                        break
        except (OSError, ResetError):
            # Without lingering, closing sends a reset.
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        finally:
            with self._lock:
                self._sockets.discard(client)
            client.close()

    def _read(self, client: socket.socket, incoming: BinaryIO) -> Request | None:
        if not (line := incoming.readline().decode("latin-1").rstrip("\r\n")):
            return None
        began = time.monotonic()
        method, target, _ = line.split(" ")
        headers: Headers = []
        while line := incoming.readline().decode("latin-1").rstrip("\r\n"):
            name, value = line.split(":", 1)
            headers.append((name, value.strip()))
        request = Request(method, target, headers, b"", began)
        assert request.header("Transfer-Encoding") is None, "a request with a body of unknown length"
        with self._lock:
            self.requests.append(request)
        if request.header("Expect") is not None:
            request.headers = [each for each in request.headers if each[0].lower() != "expect"]
            client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        left = int(request.header("Content-Length") or 0)
        pieces = []
        while left and (piece := incoming.read(min(left, _PIECE_BYTES))):
            self._pace(len(piece))
            pieces.append(piece)
            left -= len(piece)
        request.body = b"".join(pieces)
        return None if left else request

    def _exchange(self, client: socket.socket, request: Request) -> bool:
        """Answer a request, and say whether the connection stays open."""
        with self._lock:
            due = [each for each in self._rules if each.is_due(request)]
            rule = due[0] if due else None
            if rule is not None:
                rule.met += 1
        self._closing.wait(self.latency_seconds)
        signed = list(request.headers)
        answer = rule.fault.before(request) if rule else None
        if answer is not None:
            return self._send(client, request, answer)
        if request.headers != signed and self._credentials is not None:
            sign_again(request, *self._credentials)
        server = http.client.HTTPConnection(*self._server)
        with self._lock:
            server.connect()
            self._sockets.add(server.sock)
            upstream = server.sock
        try:
            server.putrequest(request.method, request.target, skip_host=True, skip_accept_encoding=True)
            for name, value in request.headers:
                server.putheader(name, value)
            server.endheaders(request.body)
            response = server.getresponse()
            # The library has removed the chunks of a body without a length.
            body = response if response.length is not None else io.BytesIO(response.read())
            answer = Answer(response.status, response.getheaders(), body)
            if isinstance(body, io.BytesIO):
                answer.set("Transfer-Encoding", None)
                answer.set("Content-Length", str(len(body.getvalue())))
            return self._send(client, request, rule.fault.after(answer) if rule else answer)
        finally:
            with self._lock:
                self._sockets.discard(upstream)
            server.close()

    def _send(self, client: socket.socket, request: Request, answer: Answer) -> bool:
        if answer.is_lost:
            raise ResetError
        reason = http.client.responses.get(answer.status, "")
        lines = [f"HTTP/1.1 {answer.status} {reason}", *(f"{name}: {value}" for name, value in answer.headers)]
        # Set before each time that bytes are sent, because the client may go on before this thread does.
        request.status, request.ended = answer.status, time.monotonic()
        client.sendall("\r\n".join([*lines, "", ""]).encode("latin-1"))
        has_body = request.method != "HEAD" and answer.status not in (204, 304)
        for piece in _pieces(answer) if has_body else ():
            self._pace(len(piece))
            request.answered_bytes += len(piece)
            request.ended = time.monotonic()
            client.sendall(piece)
        if answer.stall_at is not None:
            client.recv(1)
            return False
        # A client would wait for the rest of a body that is shorter than its header says.
        headers = {name.lower(): value for name, value in answer.headers}
        is_whole = not has_body or request.answered_bytes == int(headers.get("content-length", 0))
        return is_whole and headers.get("connection", "").lower() != "close"

    def _pace(self, length: int) -> None:
        """Wait until bytes have gone over the link that all connections share."""
        if self.bytes_per_second is None:
            return
        with self._lock:
            self._free_at = max(self._free_at, time.monotonic()) + length / self.bytes_per_second
            wait = self._free_at - time.monotonic()
        self._closing.wait(wait)


def _pieces(answer: Answer) -> Iterator[bytes]:
    left = min((each for each in (answer.cut_at, answer.stall_at) if each is not None), default=1 << 63)
    while left and (piece := answer.body.read(min(left, _PIECE_BYTES))):
        yield piece
        left -= len(piece)


def _shut(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
