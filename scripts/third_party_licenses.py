"""Writes LICENSE-THIRD-PARTY: the licences of all that is linked into the extension module, for the wheel.

    make licenses

Of a crate under a choice of licences with MIT in it, MIT is taken. Macros that run while it compiles are named too:
what they write is in it.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "LICENSE-THIRD-PARTY"

#: What wheels are built for.
PLATFORMS = [f"{machine}-unknown-linux-{libc}" for machine in ("x86_64", "aarch64") for libc in ("gnu", "musl")]

LICENSE_FILE = re.compile(r"(li[cs]en[cs]e|copying|copyright|notice|unlicense)", re.IGNORECASE)
OTHER_CHOICES = re.compile(r"apache|unlicense|bsl|boost|zlib|copying|copyright", re.IGNORECASE)

# Of what is not in Rust and compiled in with a crate, under a licence of its own: the file in the crate.
COMPILED_IN = {"lz4-sys": ("LZ4 library (BSD-2-Clause)", "liblz4/lib/LICENSE")}

HEAD = """\
What is linked into the extension module of vmsnap, beside vmsnap itself: {count} crates of Rust, each with its version,
and Rust's standard library (MIT or Apache-2.0, Copyright The Rust Project Contributors). Their licences follow. Where
there is a choice that has MIT, MIT is taken. Written by scripts/third_party_licenses.py.
"""


def linked_crates() -> list[dict[str, Any]]:
    """What cargo links for the Python package on any of the platforms, without what only builds it."""
    command = ["cargo", "metadata", "--format-version=1", "--locked", "--features=python"]
    command += [f"--filter-platform={platform}" for platform in PLATFORMS]
    metadata = json.loads(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout)
    nodes = {node["id"]: node for node in metadata["resolve"]["nodes"]}
    ours = metadata["resolve"]["root"]
    found: set[str] = set()
    waiting = [ours]
    while waiting:
        crate = waiting.pop()
        if crate in found:
            continue
        found.add(crate)
        for dependency in nodes[crate]["deps"]:
            if any(kind["kind"] is None for kind in dependency["dep_kinds"]):  # neither "dev" nor "build"
                waiting.append(dependency["pkg"])
    crates = [package for package in metadata["packages"] if package["id"] in found - {ours}]
    return sorted(crates, key=lambda package: (package["name"], package["version"]))


def license_texts(crate: dict[str, Any], mit: str) -> list[str]:
    """Return what a crate's files say; of one that has none, and may be had under MIT, that with its authors."""
    expression = (crate["license"] or "").replace("/", " OR ")
    folder = Path(crate["manifest_path"]).parent
    files = sorted(file for file in folder.iterdir() if LICENSE_FILE.match(file.name) and file.is_file())
    is_choice = "MIT" in expression.split(" OR ")
    if is_choice:
        files = [file for file in files if not OTHER_CHOICES.search(file.name)] or files
    if files:
        return [file.read_text(encoding="utf-8", errors="replace") for file in files]
    if not is_choice:
        sys.exit(f"{crate['name']} {crate['version']} ({expression}) has no file with its licence: find out what it is")
    authors = ", ".join(re.sub(r" *<.*?>", "", author) for author in crate["authors"])
    return [re.sub(r"(?<=Copyright \(c\) ).*", authors or f"The authors of {crate['name']}", mit)]


def rendered(text: str) -> str:
    """Return a text without blank lines around it and spaces at the ends of its lines."""
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


def whole() -> str:
    """Return the file: each text once, under the names of its crates."""
    mit = (ROOT / "LICENSE-MIT").read_text(encoding="utf-8")
    crates = linked_crates()
    by_text: dict[str, tuple[str, list[str]]] = {}
    for crate in crates:
        for text in license_texts(crate, mit):
            _, names = by_text.setdefault(" ".join(text.split()), (rendered(text), []))
            names.append(f"{crate['name']} {crate['version']} ({crate['license']})")
        if crate["name"] in COMPILED_IN:
            what, file = COMPILED_IN[crate["name"]]
            text = Path(crate["manifest_path"]).parent.joinpath(file).read_text(encoding="utf-8")
            by_text[text] = (rendered(text), [f"{what}, compiled in with {crate['name']} {crate['version']}"])
    sections = ["\n".join([*names, "", text, ""]) for text, names in by_text.values()]
    return f"\n{'=' * 100}\n\n".join([HEAD.format(count=len(crates)), *sections])


if __name__ == "__main__":
    TARGET.write_text(whole(), encoding="utf-8")
