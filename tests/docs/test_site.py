"""The pages hold together: links, anchors, and what the site makes of them."""

import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

ROOT = Path(__file__).parents[2]
if not (ROOT / "mkdocs.yml").exists():
    pytest.skip("the documentation is not beside the tests", allow_module_level=True)
DOCS = ROOT / "docs"
PAGES = [*ROOT.glob("*.md"), *DOCS.rglob("*.md")]


def prose(page: Path) -> str:
    """Without code, in which brackets are no links."""
    return re.sub(r"```.*?```|`[^`\n]*`(?!\])", "", page.read_text(encoding="utf-8"), flags=re.S)


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", prose(page) + page.read_text(), re.MULTILINE)
    kept = (re.sub(r"[^\w\s-]", "", heading.lower()).strip() for heading in headings)
    return {re.sub(r"[\s]+", "-", heading) for heading in kept}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:|mailto:)([^)\s]+)\)", prose(page)):
        name, _, anchor = target.partition("#")
        found = (page.parent / name).resolve() if name else page
        assert found.exists(), target
        if anchor and found.suffix == ".md":
            assert anchor in anchors(found), target


def test_what_the_site_places_exists():
    """And pages with no place are not lost: they stand under "More"."""
    hooks = runpy.run_path(str(DOCS / "hooks.py"))
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    placed = hooks["pages"](nav)
    assert len(set(placed)) == len(placed) and all((DOCS / page).exists() for page in placed)
    whole = hooks["on_config"](SimpleNamespace(docs_dir=str(DOCS), nav=nav[1:])).nav
    assert "index.md" in whole[-1]["More"]
    assert set(hooks["pages"](whole)) == {str(p.relative_to(DOCS)) for p in DOCS.rglob("*.md")}


def test_links_to_files_beside_the_pages_are_their_text(caplog):
    shown = runpy.run_path(str(DOCS / "hooks.py"))["on_page_markdown"]
    page = SimpleNamespace(file=SimpleNamespace(src_uri="results/README.md"))
    text = "[a](../../iqmpc/agent.py) [b](../method.md#losses) [`c`](../../gone/) [d](run.py)"
    config = SimpleNamespace(docs_dir=str(DOCS))
    assert shown(text, page, config) == "a [b](../method.md#losses) `c` [d](run.py)"
    assert [record.args[1] for record in caplog.records] == ["../../gone/"]
