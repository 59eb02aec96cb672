"""docs/design.md describes the source as it is: its modules, the direction of imports, its files and types."""

import re
from pathlib import Path

import pytest
from pages import REPOSITORY, text_of

SOURCE = REPOSITORY / "src"
PAGE = text_of("docs/design.md")
SECTION = text_of("docs/design.md", "Modules")

# The rows of the first table, from above: the names of the modules in each.
ROWS = [
    {Path(path).stem for path in re.findall(r"`(src/[^`]+)`", row)}
    for row in SECTION[: SECTION.index("In `src/fragment`")].splitlines()
    if row.startswith("| ") and "`src/" in row
]

# lib.rs declares the modules; fuzzing.rs is not in a release.
MODULES = sorted(
    {path.relative_to(SOURCE).parts[0].removesuffix(".rs") for path in SOURCE.rglob("*.rs")} - {"lib", "fuzzing"}
)


def row_of(module: str) -> int:
    return next(number for number, modules in enumerate(ROWS) if module in modules)


def imported(module: str) -> set[str]:
    """The modules that a module names, outside comments and tests."""
    found: set[str] = set()
    for file in [*SOURCE.glob(f"{module}.rs"), *SOURCE.glob(f"{module}/**/*.rs")]:
        if file.name == "tests.rs":
            continue
        code = re.sub(r"//[^\n]*", "", file.read_text()).split("#[cfg(test)]\nmod")[0]
        found.update(re.findall(r"\bcrate::(\w+)", code))
    return found & set(MODULES) - {module}


def test_every_module_is_in_one_row() -> None:
    assert sorted(module for row in ROWS for module in row) == MODULES


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_from_its_own_row_and_those_below(module: str) -> None:
    above = {other for other in imported(module) if row_of(other) < row_of(module)}
    assert not above


def test_every_file_on_the_page_exists() -> None:
    missing = [path for path in re.findall(r"`(src/[^`]+)`", PAGE) if not (REPOSITORY / path).exists()]
    assert not missing


def test_every_type_on_the_page_exists() -> None:
    source = "\n".join(file.read_text() for file in SOURCE.rglob("*.rs"))
    types = set(re.findall(r"`([A-Z][a-z]+[A-Za-z]*)`", PAGE))
    assert len(types) > 10
    missing = [name for name in types if not re.search(rf"\b(struct|enum|trait|type) {name}\b", source)]
    assert not missing
