"""Write tests/corpus: snapshots of every kind, sound and damaged, with the result that every reader must have for each.

    make corpus                      everything
    tests/make_corpus.py archives    the archives only, of the snapshots that are there

`snapshots.tar.gz` has the snapshots that are directories, because some file systems and tools do not keep empty
directories, pipes, links, or names that are not UTF-8. `archives.tar.gz` has those that are archives.

vmsnap writes the sound snapshots. Damaged ones are copies with a change. Snapshots that vmsnap would never write are
encrypted by hand (`floe`). Keys, IVs and nonces are random, so the files differ from run to run. `index.json` does not
differ: it has the results that docs/errors.md and docs/format.md promise, not those of some reader.
"""

import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from corpus_cases import ARCHIVES, PARTS, Corpus

CORPUS = Path(__file__).resolve().parent / "corpus"


def make(folder: Path, *, archives_only: bool = False) -> dict[str, Any]:
    """Create the snapshots in a directory, or take those that are there; then the archives. Return the index."""
    corpus = Corpus(folder)
    for add in PARTS:
        add(corpus)
    if archives_only:
        shutil.rmtree(folder)
        subprocess.run(["tar", "-xzf", CORPUS / "snapshots.tar.gz", "-C", folder.parent], check=True)
    for add in ARCHIVES:
        add(corpus)
    cases = {name: case.as_index() for name, case in sorted(corpus.cases.items())}
    return {"format": "vmsnap-corpus", "version": 1, "cases": cases}


def as_text(index: dict[str, Any]) -> str:
    """Return JSON with a line for each case, fragment and memory."""

    def dump(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)

    def table(entries: dict[str, Any], indent: str) -> str:
        lines = ",\n".join(f"{indent} {dump(key)}: {dump(entry)}" for key, entry in entries.items())
        return f"{{\n{lines}\n{indent}}}" if lines else "{}"

    def field_(key: str, value: Any) -> str:
        if key == "memory":
            return f"{dump(key)}: {table(value, '   ')}"
        if key == "result" and "fragments" in value:
            return f'{dump(key)}: {{"fragments": {table(value["fragments"], "   ")}}}'
        return f"{dump(key)}: {dump(value)}"

    cases = ",\n".join(
        f"  {dump(name)}: {{\n   " + ",\n   ".join(field_(key, value) for key, value in case.items()) + "\n  }"
        for name, case in index["cases"].items()
    )
    return f'{{\n "format": {dump(index["format"])},\n "version": {index["version"]},\n "cases": {{\n{cases}\n }}\n}}\n'


def _collect(target: Path, entries: list[Path]) -> None:
    def of_nobody(entry: tarfile.TarInfo) -> tarfile.TarInfo:
        entry.uid = entry.gid = entry.mtime = 0
        entry.uname = entry.gname = ""
        return entry

    with tarfile.open(target, "w:gz", format=tarfile.GNU_FORMAT) as archive:
        for entry in entries:
            archive.add(entry, f"snapshots/{entry.name}", filter=of_nobody)


def main() -> None:
    archives_only = sys.argv[1:] == ["archives"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "snapshots")
        folder.mkdir()
        index = as_text(make(folder, archives_only=archives_only))
        CORPUS.mkdir(exist_ok=True)
        entries = sorted(folder.iterdir())
        if not archives_only:
            _collect(CORPUS / "snapshots.tar.gz", [entry for entry in entries if entry.is_dir()])
        _collect(CORPUS / "archives.tar.gz", [entry for entry in entries if entry.is_file()])
    (CORPUS / "index.json").write_text(index, encoding="utf-8")
    print(f"written: {CORPUS}")


if __name__ == "__main__":
    main()
