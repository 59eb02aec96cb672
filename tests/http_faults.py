"""Faults that the proxy of fault_proxy.py injects, the requests and answers that it passes on, and rules for both."""

import io
import os
import re
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import BinaryIO
from urllib.parse import parse_qsl, urlsplit

Headers = list[tuple[str, str]]


@dataclass
class Request:
    """A request, as it came from the client; faults may change it on its way to the server."""

    method: str
    target: str
    headers: Headers
    body: bytes
    began: float
    #: The operation on the store, by a word that is the same for all protocols.
    kind: str = field(init=False)
    #: The status of the answer that the client got, at least a part of; None where it got nothing.
    status: int | None = None
    #: When the last bytes of the answer were about to be sent.
    ended: float | None = None
    #: Bytes of the body of the answer that were sent to the client.
    answered_bytes: int = 0

    def __post_init__(self) -> None:
        self.kind = self._kind()

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key.lower() == name.lower()), None)

    @property
    def path(self) -> str:
        return urlsplit(self.target).path

    def _kind(self) -> str:
        query = dict(parse_qsl(urlsplit(self.target).query, keep_blank_values=True))
        match self.method:
            case "GET" if "list-type" in query or query.get("comp") == "list":
                return "list"
            case "GET" if self.header("Range") or self.header("x-ms-range"):
                return "range"
            case "POST" if "uploads" in query:
                return "initiate"
            case "POST" if "delete" in query or query.get("comp") == "batch":
                return "delete"
            case "PUT" if "partNumber" in query or query.get("comp") == "block":
                return "part"
            case "POST" | "PUT" if "uploadId" in query or query.get("comp") == "blocklist":
                return "complete"
            case "DELETE" if "uploadId" in query:
                return "abort"
            case "PUT" if self.header("If-None-Match") == "*" or self.header("x-goog-if-generation-match") == "0":
                return "create"
        return self.method.lower()


@dataclass
class Answer:
    """An answer, as it goes to the client."""

    status: int
    headers: Headers
    body: BinaryIO
    #: The connection is reset instead of sending anything.
    is_lost: bool = False
    #: The offset in the body at which the connection is closed.
    cut_at: int | None = None
    #: The offset in the body at which the answer stops while the connection stays open.
    stall_at: int | None = None

    def set(self, name: str, value: str | None) -> None:
        """Replace a header, or remove it."""
        self.headers = [each for each in self.headers if each[0].lower() != name.lower()]
        if value is not None:
            self.headers.append((name, value))


class ResetError(Exception):
    """The connection to the client is reset instead of an answer."""


# Faults --------------------------------------------------------------------------------------------------------------


class Fault:
    """A fault: does something before a request is forwarded, after it was answered, or both."""

    def before(self, request: Request) -> Answer | None:
        """Change a request, or answer it so that the server never sees it."""

    def after(self, answer: Answer) -> Answer:
        """Change the answer of the server."""
        return answer


@dataclass
class Status(Fault):
    """An answer of the proxy instead of the server's: an error, or a 200 with an error in its body."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    #: Whether the server does the work first.
    works: bool = False

    def before(self, request: Request) -> Answer | None:
        return None if self.works else self._answer()

    def after(self, answer: Answer) -> Answer:
        return self._answer()

    def _answer(self) -> Answer:
        headers = [*self.headers.items(), ("Content-Length", str(len(self.body)))]
        return Answer(self.status, headers, io.BytesIO(self.body))


class Reset(Fault):
    """The connection is reset before the server sees the request."""

    def before(self, request: Request) -> Answer | None:
        raise ResetError


class LostAnswer(Fault):
    """The server does the work, and the connection is reset before the first byte of its answer."""

    def after(self, answer: Answer) -> Answer:
        answer.is_lost = True
        return answer


@dataclass
class CutBody(Fault):
    """The connection is closed within the body of the answer."""

    at: int

    def after(self, answer: Answer) -> Answer:
        answer.cut_at = self.at
        return answer


@dataclass
class Stall(Fault):
    """The answer stops within its body, and the connection stays open until the client closes it."""

    at: int

    def after(self, answer: Answer) -> Answer:
        answer.stall_at = self.at
        return answer


@dataclass
class RequestHeaders(Fault):
    """Headers of the request are replaced, or removed (None): so the server is one that does not know them."""

    headers: Mapping[str, str | None]

    def before(self, request: Request) -> None:
        changed = {name.lower() for name in self.headers}
        request.headers = [each for each in request.headers if each[0].lower() not in changed]
        request.headers += [(name, value) for name, value in self.headers.items() if value is not None]


def whole_body() -> Fault:
    """Return the fault of a server that ignores ranges: it answers 200 with the whole object."""
    return RequestHeaders({"Range": None, "x-ms-range": None})


def unconditional() -> Fault:
    """Return the fault of a server without conditional requests."""
    names = ("If-None-Match", "If-Match", "x-goog-if-generation-match")
    return RequestHeaders(dict.fromkeys(names))


@dataclass
class AnswerHeaders(Fault):
    """Headers of the answer are replaced, or removed (None)."""

    headers: Mapping[str, str | None]

    def after(self, answer: Answer) -> Answer:
        for name, value in self.headers.items():
            answer.set(name, value)
        return answer


@dataclass
class Call(Fault):
    """A function of the test runs before the request is forwarded."""

    function: Callable[[], object]

    def before(self, request: Request) -> None:
        self.function()


@dataclass
class Kill(Fault):
    """A process, given by its id or a function that returns it, is killed before the server sees the request."""

    pid: int | Callable[[], int]

    def before(self, request: Request) -> Answer | None:
        os.kill(self.pid if isinstance(self.pid, int) else self.pid(), signal.SIGKILL)
        raise ResetError


@dataclass
class Rule:
    """A fault and the requests that it meets: of those that match, the nth (from 1) and `times` - 1 after it."""

    fault: Fault
    method: str | None = None
    path: str | None = None
    kind: str | None = None
    nth: int = 1
    times: int | None = 1
    #: How many requests matched so far.
    matched: int = 0
    #: How many requests met the fault.
    met: int = 0

    def is_due(self, request: Request) -> bool:
        """Count a request if it matches, and say whether it has to meet the fault."""
        if self.method not in (None, request.method) or self.kind not in (None, request.kind):
            return False
        if self.path is not None and not re.search(self.path, request.path):
            return False
        self.matched += 1
        return self.matched >= self.nth and (self.times is None or self.matched < self.nth + self.times)
