"""Programs of other languages, built for tests in target/: of Go with checksums, of npm with a lock file."""

import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from packages import alone

REPOSITORY = Path(__file__).resolve().parents[1]
GO = REPOSITORY / "target/go"

#: Errors of tools that fetch packages, without a network.
OFFLINE = (
    *("dial tcp", "proxyconnect", "no such host", "i/o timeout", "connection refused"),  # Go
    *("Could not transfer", "Unknown host", "Connection refused", "Network is unreachable"),  # Maven
    *("ENOTFOUND", "ECONNREFUSED", "ECONNRESET", "ENETUNREACH", "EAI_AGAIN", "ETIMEDOUT"),  # npm
    *("failed to download", "Could not resolve host"),  # cargo
    *("Temporary failure", "Failed to establish a new connection", "Cannot connect to proxy"),  # pip
)

# Pauses in seconds between attempts to fetch something.
_PAUSES = (1, 5)


class UnavailableError(Exception):
    """A program cannot be had here: the text says what is missing."""


def build(*command: str | Path, cwd: Path | None = None, **environment: str) -> str:
    """Build something and return its output; where its packages cannot be had, also later, `UnavailableError`."""
    for pause in (*_PAUSES, None):
        done = subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True)
        output = done.stdout + done.stderr
        if done.returncode == 0:
            return done.stdout
        if not any(sign in output for sign in OFFLINE):
            break
        if pause is None:
            raise UnavailableError(f"{command[0]} cannot fetch packages: {output.strip()[-500:]}")
        time.sleep(pause)
    raise RuntimeError(f"{command} ended with {done.returncode}:\n{output}")


def tool(name: str, what: str) -> str:
    """Return the path of a tool; where it is missing, `UnavailableError`."""
    found = shutil.which(name)
    if found is None:
        raise UnavailableError(f"there is no {what}: no `{name}` on the PATH")
    return found


def recent_tool(name: str, what: str, least: str, option: str = "--version") -> str:
    """Return the path of a tool; where it is older than needed, `UnavailableError`."""
    found = tool(name, what)
    done = subprocess.run([found, option], capture_output=True, text=True)
    told = (done.stdout + done.stderr).strip()
    version = re.search(r"\d+(\.\d+)*", told)
    if version is None:
        raise UnavailableError(f"{what} does not tell its version: `{name} {option}` printed {told!r}")
    if _numbers(version[0]) < _numbers(least):
        raise UnavailableError(f"there is {what} {version[0]} (`{name}`), and {least} or later is needed")
    return found


def _numbers(version: str) -> list[int]:
    return [int(number) for number in version.split(".")]


def go_programs(module: str, version: str, checksum: str, *packages: str, least: str) -> Path:
    """Return the directory of the programs of a Go module, built where they are not there yet.

    The checksum, of the form "h1:...", is that of the module, whose go.sum has those of all its dependencies. So
    nobody else, such as Go's checksum database, has to be asked. `least` is the oldest Go that can build it.
    """
    made = GO / "programs" / f"{module.rsplit('/', 1)[-1]}-{version}"
    if made.is_dir():
        return made
    go = recent_tool("go", "Go", least, "version")
    environment = {
        "GOPATH": str(GO),
        "GOCACHE": str(GO / "cache"),
        "GONOSUMDB": module,
        # The repository around it is not that of the module.
        "GOFLAGS": "-modcacherw -mod=readonly -buildvcs=false",
        "CGO_ENABLED": "0",
        "GOWORK": "off",
    }
    with alone("go"):
        if made.is_dir():
            return made
        made.parent.mkdir(parents=True, exist_ok=True)
        told = json.loads(build(go, "mod", "download", "-json", f"{module}@{version}", cwd=GO, **environment))
        assert told["Sum"] == checksum, f"{module} {version} has the checksum {told['Sum']}"
        # Under its name when it is whole.
        with tempfile.TemporaryDirectory(dir=GO) as beside:
            into = f"{beside}/programs/"
            flags = ("-trimpath", "-ldflags=-s -w")
            build(go, "build", *flags, "-o", into, *packages, cwd=Path(told["Dir"]), **environment)
            os.rename(into, made)
    return made


def npm_packages(source: Path) -> Path:
    """Return the directory of the packages that a package-lock.json names, installed where they are not there yet.

    The lock file has the version and the checksum of each of them. No script of a package is run.
    """
    made = REPOSITORY / "target/npm-packages" / source.name
    locked, installed = source / "package-lock.json", made / "package-lock.json"
    with alone("npm"):
        if (made / "node_modules").is_dir() and installed.read_bytes() == locked.read_bytes():
            return made / "node_modules"
        npm = tool("npm", "npm")
        made.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=made.parent) as beside:
            copied = shutil.copytree(source, f"{beside}/packages")
            cache = f"--cache={REPOSITORY / 'target/npm'}"
            flags = ("--prefer-offline", "--ignore-scripts", "--no-audit", "--no-fund")
            build(npm, "ci", cache, *flags, cwd=Path(copied))
            shutil.rmtree(made, ignore_errors=True)
            os.rename(copied, made)
    return made / "node_modules"
