"""Site build: add the repository files that the pages link to, and adapt links to the site's folders.

Links in Markdown files are written relative to the repository, where they work too. On the site, `docs/` is the root
and the files outside of it keep their repository path.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

CHECKOUT = Path(__file__).parents[1]
OUTSIDE = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "benchmarks/*.py",
    "benchmarks/results/*",
    "data/README.md",
    "examples/*.py",
    "logitcache/extras/soft_tree.py",
    "pipelines/**/*.yaml",
    "pipelines/**/*.py",
    "pipelines/**/*.sh",
    "pipelines/README.md",
    "tests/independent_reader.py",
)
"""Files outside of `docs/` that are part of the site."""


def on_files(files: Files, config: Any) -> Files:
    """Add the files outside of `docs/`."""
    for pattern in OUTSIDE:
        for path in sorted(CHECKOUT.glob(pattern)):
            files.append(File.generated(config, path.relative_to(CHECKOUT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn links between repository files into links between site files."""
    outside = page.file.generated_by is not None
    folder = posixpath.dirname(page.file.src_uri if outside else f"docs/{page.file.src_uri}")
    start = posixpath.dirname(page.file.src_uri) or "."

    def adapted(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, match[1]))
        return f"]({posixpath.relpath(target.removeprefix('docs/'), start)}"

    return re.sub(r"\]\(([^)\s#:]+)", adapted, markdown)
