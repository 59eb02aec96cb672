"""Check the English of documentation, comments, help texts and error messages: `make lint` runs it.

    scripts/prose.py             check all files with prose
    scripts/prose.py --count     count the findings in each file
    scripts/prose.py FILE...     check these files

Spelling is codespell's task. This script finds habits that make a text hard to read: `RULES` has a pattern for each.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]

# Every file with prose that a user or a developer reads.
SCOPE = ["*.md", "docs/*.md", "examples/**/*.md", ".github/**/*.md", ".github/**/*.yml", "Makefile", "mkdocs.yml"]
SCOPE += ["scripts/*.sh", "scripts/*.py", "src/**/*.rs", "python/**/*.py", "python/**/*.pyi", "build.rs", "*.toml"]
SCOPE += ["benches/**/*.py", "benches/**/*.rs", "rust-tests/**/*.rs", "fuzz/*.py", "fuzz/**/*.rs", "fuzz/**/*.toml"]

# Patterns see a paragraph as one line with single spaces, inline code as x, and code as NUL.
RULES = {
    r"\b(is|are|was|were|be) no(ne)?\b(?!-)": 'say "is not a", or move the negation to the subject ("no file is ...")',
    r"\b(has|have|had) none\b": 'say "does not have one"',
    r"\b[Ww]hat\b(?![^.?!]*\?)": "use a noun instead of a relative clause",
    r"(\A|[.:|\0-] )\W*Who \w(?![^.?!]*\?)": 'name the person: "a user who", "a process that"',
    r"\b([Ww]ho(m|se)?|[Ww]hat)ever\b": 'name the subject: "any user", "a process that"',
    r"\bThe same(,| (of|in|for|where|as|with|when|at|by)\b)|\b[Aa]s there(?=[.,;:])": "repeat the subject",
    r"(\A|[.:|\0-] )\W*Those (of|that|who|from)\b|\b(is|are) (that|those) of\b": "name the thing",
    r"\b[Ff]olders?\b": "say directory",
    r"\b(write|writes|writing|written|wrote) over\b": "say overwrite",
    r"\b([Pp]iece|[Ss]trip)s?\b": "use a word of the glossary: chunk, segment, block, batch, page, range",
    r"\b[Ww]eakness(es)?\b": "say vulnerability",
    r"\bof (the )?\w+'s(?=[.,;:)])|\bof (ours|theirs|yours)\b": 'a double genitive: say "of X" or "X\'s"',
    r"\b(is|are|was|were) to be\b": 'say "must be" or "will be"',
    r", for (it|there|they|without|nobody|nothing|none)\b": 'say "because"',
    r"\b([Ll]est|[Ww]hence|[Ww]herein|[Tt]hereof|[Tt]herein|[Aa]new|for\sever|in\svain)\b": "use a plainer word",
    r"\bin the place of\b": "say instead of",
    r"\bbe (it|they) (in|by|on|a|an|the|that)\b": 'say "even if" or "whether"',
    r"\b(is|are|was) told of\b|\btells? of\b": "say reports",
    r"(\w[\w'/-]*,? ){45}": "more than 45 words without a stop: split the sentence",
}

# False positives of the rules.
ALLOWED = [
    # The name of a feature of VirtualBox.
    r"\b[Ss]hared\sfolders?\b",
    r"\b[Tt]here (is|are|was|were) no\b",
    r"\b(is|are|was|were|be) no (longer|more|less|later|greater|larger|smaller|faster|slower|newer|older)\b",
    # An indirect question, not a clause in place of a noun.
    r"\b(say|tell|show|know|see|ask|decide|describe|explain|list|print|choose)(s|d|es|ed)?\swhat\b",
    r"\b(says|and|or|out|by) what to\b|\b[Ww]hat (to|happens|if)\b",
]

# Comments and strings are prose, everything else is code. Raw and byte strings are code in Rust.
LEXERS = {
    ".rs": re.compile(
        r"""//[/!]?(?P<comment>[^\n]*) | '(\\.[^']*|[^'\\])' | b?r(?P<hashes>\#*)".*?"(?P=hashes) | b"(\\.|[^"\\])*"
        | "(?P<text>(\\.|[^"\\])*)" """,
        re.DOTALL | re.VERBOSE,
    ),
    ".py": re.compile(
        r"""\#:?(?P<comment>[^\n]*) | (?P<quote>\"{3}|\'{3}|"|')(?P<text>(\\.|(?!(?P=quote)).)*)(?P=quote)""",
        re.DOTALL | re.VERBOSE,
    ),
}
LEXERS[".pyi"] = LEXERS[".toml"] = LEXERS[".py"]

# Code within prose: fenced blocks and doctests are left out, inline code, placeholders and addresses count as a word.
BLOCK = re.compile(r"^[ ]*```.*?^[ ]*```[ ]*$|^[ ]*(>>>|\.\.\.)[^\n]*$", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"(`+)[^`\n]+\n?[^`\n]*\1|\{[^{}\n]*\}|\]\([^)\s]+\)|https?://\S+")


def _masked(pattern: str | re.Pattern[str], text: str, mark: str) -> str:
    """Replace every character but white space by a mark where a pattern matches."""
    return re.sub(pattern, lambda match: re.sub(r"\S", mark, match[0]), text)


def prose(text: str, suffix: str) -> str:
    """Return the text of a file with NUL for each character of code; every word stays in its line."""
    if lexer := LEXERS.get(suffix):
        shown = list(_masked(r"\S+", text, "\0"))
        for token in lexer.finditer(text):
            start, end = token.span("comment" if token["comment"] is not None else "text")
            # A string without a space is a name, a key or a pattern.
            if start >= 0 and (token["comment"] is not None or " " in text[start:end]):
                opening, closing = " " * (start - token.start()), " " * (token.end() - end)
                shown[token.start() : token.end()] = opening + text[start:end] + closing
        text = "".join(shown)
    text = text.replace("\\\n", " \n").replace(r"\n", "  ")
    return _masked(INLINE, _masked(BLOCK, text, "\0"), "x")


def findings(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yield the line, the words and the advice for everything that a rule finds in a file."""
    lines = prose(path.read_text(), path.suffix).splitlines()
    paragraph: list[tuple[str, int]] = []  # words, each with the number of its line
    for number, line in enumerate([*lines, ""], start=1):
        paragraph += [(word, number) for word in line.split()]
        if line.strip():
            continue
        text = " ".join(word for word, _ in paragraph)
        for allowed in ALLOWED:
            text = _masked(allowed, text, "x")
        for rule, advice in RULES.items():
            for match in re.finditer(rule, text):
                yield paragraph[text.count(" ", 0, match.start())][1], match[0].strip(), advice
        paragraph = []


def files(patterns: list[str]) -> set[Path]:
    """Return the files that patterns match."""
    return {path for pattern in patterns for path in REPOSITORY.glob(pattern) if path.is_file()}


def main(arguments: list[str]) -> int:
    """Report the findings; returns the status for the shell."""
    if arguments == ["--count"]:
        counts = [(sum(1 for _ in findings(path)), path.relative_to(REPOSITORY)) for path in files(SCOPE)]
        print("\n".join(f"{count:5} {path}" for count, path in sorted(counts, reverse=True) if count))
        print(f"{sum(count for count, _ in counts):5} in {len(counts)} files")
        return 0
    found = 0
    for path in [Path(argument) for argument in arguments] or sorted(files(SCOPE)):
        for line, words, advice in findings(path):
            print(f"{path}:{line}: {words!r}: {advice}", file=sys.stderr)
            found += 1
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
