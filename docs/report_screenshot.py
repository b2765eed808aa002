"""Take the README's picture of a report: `python docs/report_screenshot.py runs/demo/report.html docs/report.png`.

The teacher in the light theme, and below it some samples and the students in the dark one, by Debian's Chromium.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

WIDTH = 1180
PARTS = (
    ("light", "#teacher-title", "#figure-confusion"),
    ("dark", "#views > h3", ".samples > li"),
    ("dark", "#students .legend", "#figure-curve-loss"),
)
"""(theme, first element, last element) of each part."""
MARGIN = 18
COLOURS = 256
"""Of the picture's palette, which keeps it small."""


def screenshot(report: Path, picture: Path) -> None:
    """Three parts of the page in two themes, one below the other."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path="/usr/bin/chromium",
            args=["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        parts = []
        for scheme, first, last in PARTS:
            page = browser.new_page(viewport={"width": WIDTH, "height": 900}, color_scheme=scheme)
            page.goto(report.absolute().as_uri())
            page.wait_for_selector("html[data-drawn=yes]")
            page.evaluate("document.querySelector('nav').style.position = 'static'")
            top, bottom = (
                page.evaluate(f"document.querySelector({selector!r}).getBoundingClientRect().{side}")
                for selector, side in ((first, "top"), (last, "bottom"))
            )
            clip = {"x": 0, "y": top - MARGIN, "width": WIDTH, "height": bottom - top + 2 * MARGIN}
            parts.append(Image.open(io.BytesIO(page.screenshot(full_page=True, clip=clip))).convert("RGB"))
        browser.close()
    sheet = Image.new("RGB", (WIDTH, sum(part.height for part in parts)))
    top = 0
    for part in parts:
        sheet.paste(part, (0, top))
        top += part.height
    sheet.quantize(COLOURS, dither=Image.Dither.NONE).save(picture, optimize=True)


if __name__ == "__main__":
    screenshot(Path(sys.argv[1]), Path(sys.argv[2]))
