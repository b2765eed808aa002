"""The documentation site: builds without a warning, and its pages request nothing from other hosts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
REQUESTS = re.compile(
    r"""<(?:script|img|iframe|source)\b[^>]*\bsrc=["'](?://|\w+:)|<link\b[^>]*\bhref=["'](?://|\w+:)"""
)
"""Elements that load something from another host; a plain link does not."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", folder],
        cwd=CHECKOUT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        check=True,
    )
    return folder


def test_the_site_has_a_page_for_every_document(site: Path) -> None:
    documents = [path.relative_to(CHECKOUT / "docs").with_suffix(".html") for path in CHECKOUT.glob("docs/**/*.md")]

    assert [] == [page for page in documents if not (site / page).exists()]


def test_the_api_reference_renders_docstrings(site: Path) -> None:
    page = (site / "reference/logitcache.html").read_text()

    assert 'id="logitcache.create"' in page
    assert "float32" in page


def test_no_page_requests_anything_from_another_host(site: Path) -> None:
    found = {page.name: REQUESTS.findall(page.read_text()) for page in site.rglob("*.html")}
    styles = [style.name for style in site.rglob("*.css") if re.search(r"url\(['\"]?(?://|https?:)", style.read_text())]

    assert {} == {name: requests for name, requests in found.items() if requests}
    assert [] == styles
