"""Object stores that tests run on loopback: versitygw for S3, Azurite for Azure, fake-gcs-server for Google's.

A server lives as long as the process of pytest that started it, also where that process is killed. Each worker of
pytest-xdist starts its own where one of its tests needs it: a server is ready in a second or so, and workers that
shared one would have to agree on the process that ends it.
"""

import base64
import hashlib
import hmac
import itertools
import json
import shutil
import socket
import subprocess
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from email.utils import formatdate
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

import pytest
from fault_proxy import FaultProxy
from gcs_uploads import XmlUploads
from toolchains import UnavailableError, go_programs, npm_packages, recent_tool

_SOURCES = Path(__file__).resolve().parent / "programs"

NO_OBSTORE = "no obstore beside this Python: pip install --group stores (no wheel for free-threaded CPython)"

# Numbers of buckets. Nobody else uses the server.
_numbers = itertools.count(1)


class Server(ABC):
    """A server that runs, with its data in a directory of its own."""

    scheme: ClassVar[str]

    #: The id of its process.
    pid: int

    def __init__(self, port: int, directory: Path) -> None:
        self.endpoint = f"http://127.0.0.1:{port}"
        self.port, self.directory = port, directory

    @classmethod
    @abstractmethod
    def program(cls) -> tuple[str, ...]:
        """Return the first words of the command, of a program that is fetched and built where it is not there yet."""

    @abstractmethod
    def arguments(self) -> tuple[str, ...]:
        """Return the other words of the command."""

    @abstractmethod
    def storage_options(self, endpoint: str) -> dict[str, str]:
        """Return options of Rust's object_store for the server behind an endpoint."""

    @abstractmethod
    def _create(self, name: str) -> None:
        """Create a bucket."""

    @contextmanager
    def entrance(self) -> Iterator[str]:
        """Return the endpoint for clients, for the time of a block."""
        yield self.endpoint

    def new_bucket(self) -> "Bucket":
        """Create an empty bucket."""
        name = f"vmsnap-{next(_numbers)}"
        self._create(name)
        return Bucket(f"{self.scheme}://{name}", self.endpoint, self)

    def request(self, method: str, target: str, body: bytes = b"", **headers: str) -> int:
        """Make a request without a client library, and return the status of the answer."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, target, body, headers)
            return connection.getresponse().status
        finally:
            connection.close()


@dataclass(frozen=True)
class Bucket:
    """A bucket of a test (in Azure: a container) and the endpoint by which clients reach it."""

    url: str
    endpoint: str
    server: Server

    @property
    def name(self) -> str:
        return urlsplit(self.url).netloc

    @property
    def storage_options(self) -> dict[str, str]:
        """Options of Rust's object_store, by the names of its configuration keys."""
        return self.server.storage_options(self.endpoint)

    def at(self, endpoint: str) -> "Bucket":
        """Return the bucket as clients see it through a proxy."""
        return replace(self, endpoint=endpoint)

    def store(self, prefix: str = "", **options: Any) -> Any:
        """Return another client for it than vmsnap: obstore's."""
        obstore_store = pytest.importorskip("obstore.store", reason=NO_OBSTORE)
        url = f"{self.url}/{prefix}" if prefix else self.url
        # obstore knows options of HTTP by a parameter of its own only.
        config = {key: value for key, value in self.storage_options.items() if not key.endswith("_allow_http")}
        options["client_options"] = {"allow_http": True} | options.get("client_options", {})
        return obstore_store.from_url(url, config=config, **options)


class S3(Server):
    """versitygw, whose buckets are directories."""

    scheme = "s3"
    access_key, secret_key, region = "test", "secretsecret", "us-east-1"

    @classmethod
    def program(cls) -> tuple[str, ...]:
        checksum = "h1:au+wI+aybno/STsQiSm35Uu6Q6iK5MWReQxgO6SEMFc="
        module = "github.com/versity/versitygw"
        built = go_programs(module, "v1.8.0", checksum, "./cmd/versitygw", least="1.21")
        return (str(built / "versitygw"),)

    def arguments(self) -> tuple[str, ...]:
        # Attributes of objects are in files of a directory, because some file systems do not keep them.
        buckets, attributes = self.directory / "buckets", self.directory / "attributes"
        for directory in (buckets, attributes):
            directory.mkdir()
        options = ("--access", self.access_key, "--secret", self.secret_key, "--region", self.region, "--quiet")
        return (*options, "--port", f"127.0.0.1:{self.port}", "posix", "--sidecar", str(attributes), str(buckets))

    def storage_options(self, endpoint: str) -> dict[str, str]:
        return {
            "aws_endpoint": endpoint,
            "aws_access_key_id": self.access_key,
            "aws_secret_access_key": self.secret_key,
            "aws_region": self.region,
            "aws_allow_http": "true",
        }

    def _create(self, name: str) -> None:
        (self.directory / "buckets" / name).mkdir()


class Azure(Server):
    """Azurite, with the account and the key that every copy of it has."""

    scheme = "az"
    account = "devstoreaccount1"
    key = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="

    @classmethod
    def program(cls) -> tuple[str, ...]:
        node = recent_tool("node", "Node.js", "18")
        return (node, str(npm_packages(_SOURCES / "azurite") / "azurite/dist/src/blob/main.js"))

    def arguments(self) -> tuple[str, ...]:
        options = ("--silent", "--disableTelemetry", "--skipApiVersionCheck")
        return (*options, "--blobPort", str(self.port), "--location", str(self.directory))

    def storage_options(self, endpoint: str) -> dict[str, str]:
        return {
            "azure_storage_endpoint": f"{endpoint}/{self.account}",
            "azure_storage_account_name": self.account,
            "azure_storage_account_key": self.key,
            "azure_allow_http": "true",
        }

    def _create(self, name: str) -> None:
        headers = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": "2021-08-06"}
        signed = "PUT" + "\n" * 12 + "".join(f"{key}:{value}\n" for key, value in headers.items())
        # The name of the account is there twice: it is also a part of the path.
        signed += f"/{self.account}/{self.account}/{name}\nrestype:container"
        digest = hmac.digest(base64.b64decode(self.key), signed.encode(), hashlib.sha256)
        headers["Authorization"] = f"SharedKey {self.account}:{base64.b64encode(digest).decode()}"
        status = self.request("PUT", f"/{self.account}/{name}?restype=container", **headers)
        assert status == 201, status


class Gcs(Server):
    """fake-gcs-server, which checks no signatures, and has neither conditional reads nor uploads in parts."""

    scheme = "gs"

    @classmethod
    def program(cls) -> tuple[str, ...]:
        checksum = "h1:K03sAvbLvDz4hAynpCCUqnNRp+ik9JFSvHbkD/wTPOU="
        built = go_programs("github.com/fsouza/fake-gcs-server", "v1.56.1", checksum, ".", least="1.21")
        return (str(built / "fake-gcs-server"),)

    def arguments(self) -> tuple[str, ...]:
        # A host without a port is that of each port, so also of a proxy.
        place = ("-host", "127.0.0.1", "-port", str(self.port), "-public-host", "127.0.0.1")
        return ("-scheme", "http", *place, "-backend", "memory", "-log-level", "error")

    def storage_options(self, endpoint: str) -> dict[str, str]:
        account = {
            "gcs_base_url": endpoint,
            "disable_oauth": True,
            "client_email": "",
            "private_key": "",
            "private_key_id": "",
        }
        return {"google_service_account_key": json.dumps(account), "google_allow_http": "true"}

    @contextmanager
    def entrance(self) -> Iterator[str]:
        with FaultProxy(self.endpoint) as proxy:
            proxy.rule(XmlUploads(), method="PUT", times=None)
            yield proxy.endpoint

    def _create(self, name: str) -> None:
        body = json.dumps({"name": name}).encode()
        status = self.request("POST", "/storage/v1/b?project=test", body, **{"Content-Type": "application/json"})
        assert status == 200, status


@contextmanager
def running(kind: type[Server], parent: Path) -> Iterator[Server]:
    """Run a server for the time of a block, with its data below a directory; skips the test where it cannot be had."""
    try:
        program = kind.program()
    except UnavailableError as error:
        pytest.skip(f"there is no server for {kind.scheme}:// URLs: {error}")
    if shutil.which("setpriv") is None:
        pytest.skip("there is no setpriv, by which a server ends with its parent: apt install util-linux")
    with tempfile.TemporaryDirectory(dir=parent, prefix=f"{kind.scheme}-") as directory:
        # Another process may take the port before the server has it.
        for attempt in range(3):
            home = Path(directory, str(attempt))
            home.mkdir()
            server = kind(_free_port(), home)
            with _started([*program, *server.arguments()], home / "log") as process:
                server.pid = process.pid
                if _is_ready(server, process):
                    with server.entrance() as server.endpoint:
                        yield server
                    return
            said = (home / "log").read_text()
        pytest.fail(f"{program} does not start: {said}")


@contextmanager
def _started(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    # A signal of the kernel, so that it ends also where this process has no time to end it.
    ends_with_parent = ("setpriv", "--pdeathsig", "KILL")
    with (
        open(log, "wb") as file,
        subprocess.Popen(
            [*ends_with_parent, *command], stdin=subprocess.DEVNULL, stdout=file, stderr=file, cwd=log.parent
        ) as process,
    ):
        try:
            yield process
        finally:
            process.kill()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def _is_ready(server: Server, process: subprocess.Popen[bytes]) -> bool:
    """Ask a server until it answers; False if it ended."""
    while True:
        try:
            process.wait(timeout=0.02)
            return False
        except subprocess.TimeoutExpired:
            pass
        try:
            server.request("GET", "/")
        except OSError:
            continue
        return process.poll() is None
