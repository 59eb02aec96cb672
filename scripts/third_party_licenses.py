"""Write LICENSE-THIRD-PARTY, which the wheel contains: the licences of all code in the extension module.

    make licenses

If a crate offers a choice of licences that includes MIT, MIT is chosen. Procedural macros are included, because the
module contains their output.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "LICENSE-THIRD-PARTY"

#: The platforms of the wheels.
PLATFORMS = [f"{machine}-unknown-linux-{libc}" for machine in ("x86_64", "aarch64") for libc in ("gnu", "musl")]

#: The features of the wheel, as in pyproject.toml.
FEATURES = "python,object-store"

LICENSE_FILE = re.compile(r"(li[cs]en[cs]e|copying|copyright|notice|unlicense)", re.IGNORECASE)
OTHER_CHOICES = re.compile(r"apache|unlicense|bsl|boost|zlib|copying|copyright", re.IGNORECASE)

# Libraries in other languages that a crate compiles in, with the file of the crate that has their licence.
COMPILED_IN = {"lz4-sys": ("LZ4 library (BSD-2-Clause)", "liblz4/lib/LICENSE")}

HEAD = """\
The extension module of vmsnap contains, beside vmsnap itself, {count} crates of Rust, listed with their versions, and
the standard library of Rust (MIT or Apache-2.0, Copyright The Rust Project Contributors). Their licences follow. If a
crate offers a choice that includes MIT, MIT is chosen. Written by scripts/third_party_licenses.py.
"""


def linked_crates() -> list[dict[str, Any]]:
    """Return the crates in the Python package on any of the platforms, without build and test dependencies."""
    common = ["--locked", f"--features={FEATURES}"]
    # `cargo metadata` also lists optional crates that are not compiled; `cargo tree` does not have the paths.
    tree = ["cargo", "tree", *common, "--edges=normal", "--prefix=none", "--format={p}"]
    tree += [f"--target={platform}" for platform in PLATFORMS]
    printed = subprocess.run(tree, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    linked = {tuple(line.split()[:2]) for line in printed.splitlines() if line}
    command = ["cargo", "metadata", "--format-version=1", *common]
    command += [f"--filter-platform={platform}" for platform in PLATFORMS]
    metadata = json.loads(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout)
    ours = metadata["resolve"]["root"]
    crates = [
        package
        for package in metadata["packages"]
        if package["id"] != ours and (package["name"], f"v{package['version']}") in linked
    ]
    return sorted(crates, key=lambda package: (package["name"], package["version"]))


def license_texts(crate: dict[str, Any], mit: str) -> list[str]:
    """Return the licence texts of a crate. A crate without a file that offers MIT gets MIT with its authors."""
    expression = (crate["license"] or "").replace("/", " OR ")
    directory = Path(crate["manifest_path"]).parent
    files = sorted(file for file in directory.iterdir() if LICENSE_FILE.match(file.name) and file.is_file())
    is_choice = "MIT" in expression.split(" OR ")
    if is_choice:
        files = [file for file in files if not OTHER_CHOICES.search(file.name)] or files
    if files:
        return [file.read_text(encoding="utf-8", errors="replace") for file in files]
    if not is_choice:
        sys.exit(f"{crate['name']} {crate['version']} ({expression}) has no licence file: add its text by hand")
    authors = ", ".join(re.sub(r" *<.*?>", "", author) for author in crate["authors"])
    return [re.sub(r"(?<=Copyright \(c\) ).*", authors or f"The authors of {crate['name']}", mit)]


def rendered(text: str) -> str:
    """Return a text without blank lines around it and without spaces at the ends of lines."""
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


def whole() -> str:
    """Return the contents of the file: each text once, below the names of its crates."""
    mit = (ROOT / "LICENSE-MIT").read_text(encoding="utf-8")
    crates = linked_crates()
    by_text: dict[str, tuple[str, list[str]]] = {}
    for crate in crates:
        for text in license_texts(crate, mit):
            _, names = by_text.setdefault(" ".join(text.split()), (rendered(text), []))
            names.append(f"{crate['name']} {crate['version']} ({crate['license']})")
        if crate["name"] in COMPILED_IN:
            library, file = COMPILED_IN[crate["name"]]
            text = Path(crate["manifest_path"]).parent.joinpath(file).read_text(encoding="utf-8")
            by_text[text] = (rendered(text), [f"{library}, compiled in with {crate['name']} {crate['version']}"])
    sections = ["\n".join([*names, "", text, ""]) for text, names in by_text.values()]
    return f"\n{'=' * 100}\n\n".join([HEAD.format(count=len(crates)), *sections])


if __name__ == "__main__":
    TARGET.write_text(whole(), encoding="utf-8")
