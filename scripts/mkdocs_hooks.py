"""Hooks of mkdocs: links that leave docs/, the changelog as a page, and rustdoc as a part of the site.

In the sources, every link is a relative path, which the code host follows. On the site, a link that leaves docs/ leads
to the code host, unless the site has the target (`ON_THE_SITE`).
"""

import logging
import os
import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

REPOSITORY = Path(__file__).resolve().parents[1]
CODE_HOST = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["urls"]["Repository"]

# Paths from the repository's root to paths on the site.
ON_THE_SITE = {
    "CHANGELOG.md": "changelog.md",
    "src/lib.rs": "rust-api/vmsnap/index.html",
}

# mkdocs counts the warnings of its own loggers, and `strict` makes them errors.
log = logging.getLogger("mkdocs.hooks.vmsnap")

_CODE_BLOCK = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
_INLINE_CODE = re.compile(r"<code>[^<]*</code>")
_LINK = re.compile(r"\]\((?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?\)")


def on_config(config: MkDocsConfig) -> None:
    """Link the code host in the footer of every page."""
    config.extra["social"] = [{"icon": "fontawesome/brands/github", "link": CODE_HOST, "name": "Source code"}]


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the changelog, and the page of the crate from rustdoc, so that mkdocs checks the link to it."""
    files.append(File.generated(config, "changelog.md", abs_src_path=str(REPOSITORY / "CHANGELOG.md")))
    crate = _rustdoc(config) / "vmsnap/index.html"
    if not crate.exists():
        raise PluginError(f"{crate} is missing: run cargo doc --locked --no-deps")
    files.append(File.generated(config, ON_THE_SITE["src/lib.rs"], abs_src_path=str(crate)))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **_: Any) -> str:
    """Point each link that leaves docs/ to its target on the site, or to the code host."""
    source = "CHANGELOG.md" if page.file.src_uri == "changelog.md" else f"docs/{page.file.src_uri}"

    def rewritten(link: re.Match[str]) -> str:
        target = os.path.normpath(os.path.join(os.path.dirname(source), link[1]))
        anchor = link[2] or ""
        if target.startswith("docs/"):
            return f"]({target.removeprefix('docs/')}{anchor})"
        if target in ON_THE_SITE:
            return f"]({ON_THE_SITE[target]}{anchor})"
        if not (REPOSITORY / target).exists():
            log.warning("%s links to %s, which does not exist", source, link[1])
        kind = "tree" if (REPOSITORY / target).is_dir() else "blob"
        return f"]({CODE_HOST}/{kind}/main/{target}{anchor})"

    # Parts with an odd index are code blocks.
    parts = _CODE_BLOCK.split(markdown)
    parts[::2] = [_LINK.sub(rewritten, part) for part in parts[::2]]
    return "".join(parts)


def on_post_build(config: MkDocsConfig) -> None:
    """Copy the rest of rustdoc unchanged, because mkdocs would make a page of a licence in it."""
    hidden = shutil.ignore_patterns(".*")
    shutil.copytree(_rustdoc(config), Path(config.site_dir, "rust-api"), ignore=hidden, dirs_exist_ok=True)


def _rustdoc(config: MkDocsConfig) -> Path:
    return REPOSITORY / str(config.extra["rustdoc"])


def on_page_content(html: str, **_: Any) -> str:
    r"""Show `\|` in the code of a table as a pipe, as the code host does."""
    return _INLINE_CODE.sub(lambda code: code[0].replace(r"\|", "|"), html)
