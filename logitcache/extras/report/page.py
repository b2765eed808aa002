"""The page: one HTML file that works offline and makes no network request."""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib.util
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from rich.filesize import decimal as size

from logitcache.errors import UsageError
from logitcache.extras.report import formatting
from logitcache.extras.report.charts import Figure

_HERE = Path(__file__).parent
_SNIPPET = "window.vegaEmbed = vegaEmbed;"


def check_installed() -> None:
    """Check that the packages of the extra `report` are installed.

    Raises:
        UsageError: names the missing ones.
    """
    missing = [name for name in ("vl_convert", "captum") if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"a report needs {', '.join(missing)}: pip install 'logitcache[report]'")


def render(figures: Mapping[str, Figure], **values: Any) -> str:
    """The whole page as HTML.

    Args:
        figures: by id; the templates show those that are present.
        values: what the templates show; everything is escaped.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.do"],
    )
    filters = ("as_yaml", "count", "counted", "decimal", "number", "percent", "plain_text", "with_spread")
    environment.filters |= {name: getattr(formatting, name) for name in filters} | {"size": size}
    environment.globals["figures"] = figures
    style, script = ((_HERE / f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    scripts = [_embeddable(_plot_library()), _embeddable(script)]
    # Safe as markup: files of this package, and JSON in which no character can end the script element.
    return environment.get_template("page.html").render(
        values,
        style=Markup(style),
        specs=Markup(json_for_script({name: figure.spec for name, figure in figures.items()})),
        scripts=[Markup(script) for script in scripts],
        script_hashes=[_csp_hash(script) for script in scripts],
        version=version("logitcache"),
    )


def json_for_script(value: Any) -> str:
    """JSON for a <script> element: it contains no character that starts or ends markup or a line.

    Raises:
        ValueError: NaN or infinity, which JSON does not support.
    """
    text = json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


@functools.cache
def _plot_library() -> str:
    """Vega, Vega-Lite and Vega-Embed as one self-contained script."""
    import vl_convert

    return vl_convert.javascript_bundle(snippet=_SNIPPET)


def _embeddable(script: str) -> str:
    """A script without the sequences that end its element. They occur in strings only; escaping keeps the values."""
    return script.replace("</script", "<\\/script").replace("<!--", "<\\!--").replace("\r\n", "\n").replace("\r", "\n")


def _csp_hash(script: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"
