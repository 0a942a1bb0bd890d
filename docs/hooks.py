"""mkdocs: what the site makes of pages that are written to be read in the tree."""

from __future__ import annotations

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

_LOG = logging.getLogger("mkdocs.hooks.iqmpc")  # whose warnings fail a strict build
_OUTSIDE = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+[^)#]*)(?:#[^)]*)?\)")


def on_config(config: Any) -> Any:
    """Pages that mkdocs.yml gives no place stand under "More"."""
    docs = Path(config.docs_dir)
    placed = set(pages(config.nav))
    rest = sorted({str(path.relative_to(docs)) for path in docs.rglob("*.md")} - placed)
    config.nav += [{"More": rest}] if rest else []
    return config


def pages(nav: Any) -> list[str]:
    """The pages of a table of contents, at any depth."""
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav
    return [page for part in parts for page in pages(part)]


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """The page with links to files beside docs/, which a site does not have, as their text.

    The text names the file. A link to nothing is warned of.
    """
    docs, folder = Path(config.docs_dir), posixpath.dirname(page.file.src_uri)

    def shown(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, link[2]))
        if not target.startswith(".."):
            return link[0]
        if not (docs / target).exists():
            _LOG.warning("%s links to %s, which is not in the tree", page.file.src_uri, link[2])
        return link[1]

    return _OUTSIDE.sub(shown, markdown)
