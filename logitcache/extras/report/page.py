"""The page: one file that opens without a network, and may not ask for one."""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib.util
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from logitcache.errors import UsageError
from logitcache.extras.report.figures import Section
from logitcache.extras.report.words import ClassNames, decimal, name_of, percent

_HERE = Path(__file__).parent
_SNIPPET = "window.vegaEmbed = vegaEmbed;"


def check_installed() -> None:
    """Refuse a page that can't be made.

    Raises:
        UsageError: a package of the extra `report` is not installed.
    """
    missing = [name for name in ("altair", "vl_convert", "jinja2", "captum") if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"a report needs {', '.join(missing)}: pip install 'logitcache[report]'")


def render(
    *, title: str, sections: Sequence[Section], tiles: Sequence[tuple[str, str, str]], class_names: ClassNames
) -> str:
    """The whole page as HTML.

    Args:
        title: of the page, plain text; as all else, it is escaped.
        sections: in their order.
        tiles: (what, value, remark) of the numbers at the top.
        class_names: for the pictures.
    """
    import jinja2

    specs = {figure.id: figure.spec for section in sections for figure in section.figures}
    scripts = [_embeddable(_plot_library()), _embeddable((_HERE / "page.js").read_text(encoding="utf-8"))]
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": percent, "decimal": decimal, "name_of": name_of}
    template = environment.from_string((_HERE / "page.html").read_text(encoding="utf-8"))
    # Markup: these are our own files and JSON in which no character can end the script element.
    return template.render(
        title=title,
        sections=sections,
        tiles=tiles,
        class_names=class_names,
        style=_markup((_HERE / "page.css").read_text(encoding="utf-8")),
        specs=_markup(json_for_script(specs)),
        scripts=[_markup(script) for script in scripts],
        script_hashes=[_csp_hash(script) for script in scripts],
        version=version("logitcache"),
    )


def _markup(text: str) -> Any:
    from markupsafe import Markup

    return Markup(text)


def json_for_script(value: Any) -> str:
    """JSON that stays JSON inside a <script>: no character of it can begin or end markup or a line.

    Raises:
        ValueError: NaN or infinity, which JSON does not have.
    """
    text = json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


@functools.cache
def _plot_library() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script that needs nothing else."""
    import altair
    import vl_convert

    vl_version = ".".join(altair.SCHEMA_VERSION.lstrip("v").split(".")[:2])
    return vl_convert.javascript_bundle(snippet=_SNIPPET, vl_version=vl_version)


def _embeddable(script: str) -> str:
    """A script that does not end its own element; both changes stand within strings and change no value."""
    return script.replace("</script", "<\\/script").replace("<!--", "<\\!--").replace("\r\n", "\n").replace("\r", "\n")


def _csp_hash(script: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"
