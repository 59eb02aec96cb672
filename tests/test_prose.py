"""`make lint` holds the prose: codespell its spelling, scripts/prose.py the habits that make it hard to read."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPT = REPOSITORY / "scripts/prose.py"

specification = importlib.util.spec_from_file_location("prose", SCRIPT)
assert specification
assert specification.loader
prose = importlib.util.module_from_spec(specification)
specification.loader.exec_module(prose)

# A sentence for each rule, and a better one.
SENTENCES = [
    ("The text is no recipient.", "The text is not a recipient."),
    ("A process that has none stops.", "A process that does not have one stops."),
    ("What is missing is named.", "The error names each missing tool."),
    ("Who has the key can read it.", "A user who has the key can read it."),
    ("The error is for whoever called.", "The error is for the caller."),
    ("The same, in a staged snapshot.", "Creates a fragment in a staged snapshot."),
    ("As the reader, and as there, it fails.", "It fails as the reader does."),
    ("Those of the writer.", "The errors of the writer."),
    ("It lies in a folder.", "It is in a directory."),
    ("The file is never written over.", "The file is never overwritten."),
    ("Memory is read in pieces.", "Memory is read in batches."),
    ("Report a weakness in private.", "Report a vulnerability in private."),
    ("It is a key of the caller's.", "It is the caller's key."),
    ("The key is to be kept.", "The key must be kept."),
    ("Keep it, for without it nobody can read.", "Keep it, because nobody can read without it."),
    ("The key is wrapped anew.", "The key is wrapped again."),
    ("Use it in the place of the old one.", "Use it instead of the old one."),
    ("It ends, be it by a signal.", "It ends, even if a signal ends it."),
    ("The file system tells of holes.", "The file system reports holes."),
    ("So it goes" + " on and on" * 20, "So it goes on and on, and then it ends."),
]


def check(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *arguments], cwd=REPOSITORY, capture_output=True, text=True)


def test_each_rule_has_a_sentence_here_and_finds_it() -> None:
    for rule in prose.RULES:
        assert any(re.search(rule, bad) for bad, _ in SENTENCES), rule


@pytest.mark.parametrize("template", ["{}\n", "//! {}\n", 'fn f() {{ g("{}") }}\n', '"""{}"""\n', "x = 1  # {}\n"])
@pytest.mark.parametrize(("bad", "good"), SENTENCES)
def test_a_bad_sentence_is_found_and_a_good_one_passes(tmp_path: Path, template: str, bad: str, good: str) -> None:
    suffix = {"{": ".md", "/": ".rs", "f": ".rs"}.get(template[0], ".py")
    file = tmp_path / f"page{suffix}"
    file.write_text("\n\n" + template.format(bad))
    assert [line for line, _, _ in prose.findings(file)] == [3]
    file.write_text(template.format(good))
    assert not list(prose.findings(file))


def test_the_status_tells_and_the_report_names_the_line(tmp_path: Path) -> None:
    bad, good = tmp_path / "bad.md", tmp_path / "good.md"
    bad.write_text("# A page\n\nThe text of an error\nis no text for a user.\n")
    good.write_text("# A page\n\nThe text of an error is for a user.\n")
    assert check(good).returncode == 0
    failed = check(bad, good)
    assert failed.returncode == 1
    assert failed.stderr.splitlines() == [f"{bad}:4: 'is no': {prose.RULES[next(iter(prose.RULES))]}"]


def test_a_sentence_is_found_across_lines_and_adjacent_strings(tmp_path: Path) -> None:
    rust, python = tmp_path / "lib.rs", tmp_path / "module.py"
    rust.write_text('/// The key is\n/// no key.\nfn f() { g("the key is \\\n     no key") }\n')
    python.write_text('raise ValueError(\n    f"{key} is "\n    "no key"\n)\n')
    assert [(line, words) for line, words, _ in prose.findings(rust)] == [(1, "is no"), (3, "is no")]
    assert [(line, words) for line, words, _ in prose.findings(python)] == [(2, "is no")]


def test_code_is_not_prose(tmp_path: Path) -> None:
    page, rust, python = tmp_path / "page.md", tmp_path / "lib.rs", tmp_path / "module.py"
    page.write_text("Set `folder`, as here:\n\n```python\nfolder = what  # the folder is no file\n```\n")
    rust.write_text(
        "//! ```\n//! let folder = 1;\n//! ```\nlet folder: &'a str = \"folder\"; let c = '\"';\nlet what = 1;\n"
    )
    python.write_text('def folder(what):\n    """Do it.\n\n    >>> folder = what\n    """\n    return what["folder"]\n')
    for file in (page, rust, python):
        assert not list(prose.findings(file))


@pytest.mark.parametrize(
    "sentence",
    [
        "There is no key.",
        "The file is no longer than a page.",
        "The error says what failed, why, and what to do.",
        "What if the key is lost?",
        "There are as many threads as there are processors.",
    ],
)
def test_plain_english_passes(tmp_path: Path, sentence: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(sentence + "\n")
    assert not list(prose.findings(page))


def test_all_files_pass_and_each_pattern_matches_one() -> None:
    for pattern in prose.SCOPE:
        assert prose.files([pattern]), pattern
    checked = check()
    assert (checked.returncode, checked.stderr) == (0, "")


def test_every_file_can_be_counted() -> None:
    counted = check("--count")
    assert counted.returncode == 0, counted.stderr
    assert re.fullmatch(r" *\d+ in \d+ files", counted.stdout.splitlines()[-1])


def test_a_misspelling_is_found(tmp_path: Path) -> None:
    pytest.importorskip("codespell_lib")
    page = tmp_path / "page.md"
    command = [sys.executable, "-m", "codespell_lib", "--toml", REPOSITORY / "pyproject.toml", page]
    misspelt = "The snapshot is recieved.\n"  # codespell:ignore recieved
    for text, status in [(misspelt, 65), ("The snapshot is received.\n", 0)]:
        page.write_text(text)
        assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == status
