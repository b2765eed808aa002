"""Lists the folders that a web server's index page links to."""

from __future__ import annotations

import threading
import urllib.error
import urllib.request
from concurrent.futures import Future
from html.parser import HTMLParser
from http.client import HTTPException
from urllib.parse import quote, unquote, urljoin, urlsplit

from logitcache.errors import StorageError

MAX_PAGE_BYTES = 2**22


def linked_folders(url: str, *, timeout: float, deadline: float) -> list[str]:
    """Names of the folders directly below a URL, sorted; none where the URL has no index page.

    A folder is a link that ends in a slash, as on the index pages of nginx, Apache, Caddy and Python's http.server.

    Args:
        url: of the folder.
        timeout: seconds between two pieces of the response.
        deadline: seconds for the whole response.

    Raises:
        StorageError: the server can't be reached, or is too slow.
    """
    # Quotes special characters; "%" is safe, so that quoted ones stay as they are.
    base = quote(url.rstrip("/") + "/", safe=":/?#[]@!$&'()*+,;=%")
    page: Future[bytes] = Future()

    def read() -> None:
        try:
            page.set_result(_page(base, timeout))
        except BaseException as error:
            page.set_exception(error)

    # A thread, since `timeout` doesn't stop a server that sends single bytes.
    reading = threading.Thread(target=read, name="logitcache-index", daemon=True)
    reading.start()
    reading.join(deadline)
    if not page.done():
        raise StorageError(f"can't list {base}: its page is incomplete after {deadline:.0f} s; the server is too slow")
    try:
        data = page.result()
    except urllib.error.HTTPError:
        return []
    except (OSError, HTTPException) as error:
        raise StorageError(f"can't list {base}: {getattr(error, 'reason', None) or error}") from error
    links = _Links()
    links.feed(data.decode("utf-8", errors="replace"))
    here = urlsplit(base)
    names = set()
    for link in links.found:
        target = urlsplit(urljoin(base, link))
        path, below = unquote(target.path), unquote(here.path)
        name = path.removeprefix(below).rstrip("/")
        is_below = target.netloc == here.netloc and path.startswith(below) and path.endswith("/")
        if is_below and name and "/" not in name and name not in (".", ".."):
            names.add(name)
    return sorted(names)


def _page(url: str, timeout: float) -> bytes:
    request = urllib.request.Request(url, headers={"User-Agent": "logitcache", "Accept": "text/html"})
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        data: bytes = answer.read(MAX_PAGE_BYTES)
        if answer.length and len(data) < MAX_PAGE_BYTES:
            raise HTTPException("its page is incomplete")
    return data


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for name, value in attrs if tag == "a" and name == "href" and value]
