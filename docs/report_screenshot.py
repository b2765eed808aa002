"""Take the README's picture of a report: `python docs/report_screenshot.py runs/demo/report.html docs/report.png`.

Light on the left and dark on the right, from the top of the page and from its students, by Debian's Chromium.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

WIDTH, HEIGHT = 1180, 900
GAP = 24
COLOURS = 128
"""Of the picture's palette, which keeps it small."""


def screenshot(report: Path, picture: Path) -> None:
    """Two parts of the page in two themes, side by side."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path="/usr/bin/chromium",
            args=["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        parts = []
        for scheme, place in (("light", "#teacher"), ("dark", "#students .legend")):
            page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme=scheme)
            page.goto(report.absolute().as_uri())
            page.wait_for_selector("html[data-drawn=yes]")
            page.evaluate("document.querySelector('nav').style.position = 'static'")
            page.evaluate(f"document.querySelector({place!r}).scrollIntoView({{block: 'start'}})")
            parts.append(Image.open(io.BytesIO(page.screenshot())).convert("RGB"))
        browser.close()
    sheet = Image.new("RGB", (2 * WIDTH + GAP, HEIGHT), "#8a94a0")
    for number, part in enumerate(parts):
        sheet.paste(part, (number * (WIDTH + GAP), 0))
    sheet.quantize(COLOURS, dither=Image.Dither.NONE).save(picture, optimize=True)


if __name__ == "__main__":
    screenshot(Path(sys.argv[1]), Path(sys.argv[2]))
