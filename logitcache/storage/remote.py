"""Object stores and web servers, through obstore: s3://, gs://, az://, https:// (reading), memory:// (tests).

Credentials, regions and endpoints come from the usual environment variables (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`,
`GOOGLE_APPLICATION_CREDENTIALS`, `AZURE_STORAGE_ACCOUNT_NAME`, …); for AWS then from boto3 (profiles, single sign-on,
roles). Without credentials, a bucket is read as a public one.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

from logitcache.errors import StorageError, UsageError
from logitcache.storage.protocol import Arrived, Storage
from logitcache.storage.web_index import linked_folders

try:
    import obstore
    from obstore import exceptions, store
except ImportError as error:
    raise UsageError(
        "s3://, gs://, az:// and https:// need the extra `remote`: pip install 'logitcache[remote]'"
    ) from error

READ_ONLY = ("https", "http")

CONCURRENCY = 16
READ_SECONDS = 30.0
"""Timeout between two pieces of a response."""
REQUEST_SECONDS = 600.0
"""Limit for one object including repeated requests, against servers that send very slowly."""
RECORD_SECONDS = 60.0
RECORD_BYTES_PER_SECOND = 2**16
"""Limit for a record (manifest, receipts, card): RECORD_SECONDS, plus its size at RECORD_BYTES_PER_SECOND."""
LISTING_SECONDS = 3600.0
MAX_LISTED = 2**22
"""Objects of one listing: about 4000 requests, and twice as many objects as receipts can list."""
BODY_ATTEMPTS = 4
"""Requests for a response that is incomplete or has the wrong length; obstore itself repeats refused requests."""
PIECE_BYTES = 2**20
"""Larger objects arrive in pieces of this size where progress is reported."""
MULTIPART_BYTES = 64 * 2**20
"""Objects above this size are uploaded in parts."""

_RETRY: Any = {
    "max_retries": 5,
    "retry_timeout": timedelta(seconds=60),
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=5), "base": 2},
}
_memories: dict[str, Any] = {}
_process: int | None = None
"""Process that has sent requests: obstore's threads run in it, and in no process forked from it."""


def open_remote(url: str) -> RemoteStorage:
    """The store behind a URL; no request is sent.

    Raises:
        UsageError: a URL without a bucket, or incomplete credentials.
    """
    parts = urlsplit(url)
    if not parts.netloc:
        raise UsageError(f"{url} has no bucket or host; expected for example {parts.scheme}://team/imagenet.cache")
    if parts.query or parts.fragment:
        raise UsageError(f"{url}: the URL of a cache must have no ? or # part")
    try:
        if parts.scheme == "memory":
            memory = _memories.setdefault(parts.netloc, store.MemoryStore())
            return RemoteStorage(url.rstrip("/"), memory, prefix=parts.path.strip("/"))
        return RemoteStorage(url.rstrip("/"), _connect(parts.scheme, url.rstrip("/")))
    except (exceptions.BaseError, ValueError) as error:
        raise UsageError(f"{url} can't be opened: {_reason(error)}") from error


class RemoteStorage(Storage):
    """A prefix of an object store, or a folder of a web server.

    It has no lock: code that replaces records reads them again afterwards.

    Args:
        url: as users write it.
        connection: obstore's store, with the URL's path as its prefix, or without a prefix.
        prefix: the path, where the store has no prefix.
    """

    is_remote = True
    concurrency = CONCURRENCY

    def __init__(self, url: str, connection: Any, *, prefix: str = "") -> None:
        self.url = url
        self._store = connection
        self._prefix = f"{prefix}/" if prefix else ""
        self._scheme = urlsplit(url).scheme
        self.can_write = self.can_list = self._scheme not in READ_ONLY

    def get(self, key: str, *, limit: int | None = None) -> bytes | None:
        view = self._get(key, limit, None, is_record=True)
        return None if view is None else bytes(view)

    def get_view(self, key: str, *, limit: int | None = None, arrived: Arrived | None = None) -> memoryview | None:
        return self._get(key, limit, arrived, is_record=False)

    def _get(self, key: str, limit: int | None, arrived: Arrived | None, *, is_record: bool) -> memoryview | None:
        path = self._path(key)
        self._check_process()
        start = time.monotonic()
        for attempt in range(BODY_ATTEMPTS):
            try:
                return self._read(path, limit, arrived, is_record=is_record)
            except FileNotFoundError as error:
                if _lacks_bucket(error):
                    raise self._error("read", key, error) from error
                return None
            except exceptions.GenericError as error:
                late = time.monotonic() - start > REQUEST_SECONDS
                if attempt + 1 == BODY_ATTEMPTS or late or not _is_transient(error):
                    raise self._error("read", key, error) from error
                time.sleep(0.1 * 2**attempt * (1 + random.random()))
            except (exceptions.BaseError, OSError, ValueError) as error:
                raise self._error("read", key, error) from error
        raise AssertionError("the last attempt returns or raises")

    def put(self, key: str, data: bytes | memoryview, *, durable: bool = True) -> None:
        self._put(key, data, mode="overwrite")

    def create(self, key: str, data: bytes) -> bool:
        try:
            return self._put(key, data, mode="create")
        except StorageError as error:
            if not _lacks_conditional_writes(error.__cause__):
                raise
            # Without conditional writes, the later of two simultaneous writers wins.
            return self.size(key) is None and self._put(key, data, mode="overwrite")

    def size(self, key: str) -> int | None:
        with self._requests("read", key), suppress(FileNotFoundError):
            return int(obstore.head(self._store, self._path(key))["size"])
        return None

    def sizes(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        return ((key, int(entry["size"])) for key, entry in self._entries(prefix))

    def written(self, prefix: str = "") -> Iterator[tuple[str, float]]:
        return ((key, entry["last_modified"].timestamp()) for key, entry in self._entries(prefix))

    def _entries(self, prefix: str) -> Iterator[tuple[str, Any]]:
        """What a listing states of each object below a folder."""
        self._refuse_listing()
        listed = 0
        with self._requests("list", prefix), suppress(FileNotFoundError):
            for page in self._pages((self._prefix + prefix).rstrip("/") or None):
                listed += len(page)
                if listed > MAX_LISTED:
                    raise TimeoutError(f"more than {MAX_LISTED} objects, the limit of a listing")
                for entry in page:
                    yield entry["path"].removeprefix(self._prefix), entry

    def folders(self, prefix: str = "") -> list[str]:
        if self._scheme in READ_ONLY:
            return linked_folders(f"{self.url}/{prefix}", timeout=READ_SECONDS, deadline=RECORD_SECONDS)
        start = (self._prefix + prefix).rstrip("/") or None
        with self._requests("list", prefix), suppress(FileNotFoundError):
            if self._scheme == "memory":
                found = obstore.list_with_delimiter(self._store, prefix=start)
            else:
                found = _with_timeout(
                    RECORD_SECONDS, lambda: obstore.list_with_delimiter_async(self._store, prefix=start)
                )
            return sorted(folder.rstrip("/").rsplit("/", 1)[-1] for folder in found["common_prefixes"])
        return []

    def _pages(self, prefix: str | None) -> Iterator[Any]:
        """The pages of a listing."""
        pages: Any = obstore.list(self._store, prefix=prefix, chunk_size=1000)
        if self._scheme == "memory":
            yield from pages
            return
        deadline = time.monotonic() + LISTING_SECONDS
        while page := _with_timeout(deadline - time.monotonic(), lambda: anext(pages, None)):
            yield page

    def delete(self, key: str) -> None:
        self._refuse_writing()
        with self._requests("delete", key), suppress(FileNotFoundError):
            obstore.delete(self._store, self._path(key))

    def _read(self, key: str, limit: int | None, arrived: Arrived | None, *, is_record: bool) -> memoryview:
        answer = obstore.get(self._store, key)
        size = answer.meta["size"]
        max_bytes = size if limit is None else limit
        if not is_record and size <= max_bytes and (arrived is None or size <= PIECE_BYTES):
            return memoryview(answer.bytes())
        data = bytearray()
        seconds = RECORD_SECONDS + min(size, max_bytes) / RECORD_BYTES_PER_SECOND
        deadline = time.monotonic() + seconds
        # A record's pieces are read as they arrive: a piece of fixed size might never be complete.
        for piece in answer.stream(min_chunk_size=1 if is_record else PIECE_BYTES):
            data += piece
            if arrived is not None:
                arrived(len(data))
            if is_record and time.monotonic() > deadline:
                raise TimeoutError(f"{len(data)} of {size} bytes arrived in {seconds:.0f} s; the server is too slow")
            if len(data) > max_bytes:
                break  # more than the limit is not read
        return memoryview(data)[: max_bytes + 1].toreadonly()

    def _put(self, key: str, data: bytes | memoryview, *, mode: Any) -> bool:
        """Store an object; False where `mode` is "create" and there is one."""
        self._refuse_writing()
        path = self._path(key)
        large = len(data) > MULTIPART_BYTES
        with self._requests("write", key), suppress(exceptions.AlreadyExistsError, FileExistsError):
            obstore.put(self._store, path, data, mode=mode, use_multipart=large, chunk_size=2**24)
            return True
        return False

    def _path(self, key: str) -> str:
        parts = key.split("/")
        if key.startswith("/") or ".." in parts or "." in parts or "" in parts:
            raise UsageError(f"{key!r} is not a key inside the cache")
        return self._prefix + key

    @contextmanager
    def _requests(self, action: str, key: str) -> Iterator[None]:
        """Requests that do something with an object; their errors become a `StorageError`."""
        self._check_process()
        try:
            yield
        except (exceptions.BaseError, OSError) as error:
            raise self._error(action, key, error) from error

    def _check_process(self) -> None:
        """Refuse requests that would wait forever.

        Raises:
            StorageError: this process was forked from one that had sent requests.
        """
        global _process
        if self._scheme == "memory":
            return
        if _process is None:
            _process = os.getpid()
        elif _process != os.getpid():
            raise StorageError(
                f"{self.url} can't be read in this process, which was forked from one that had read from a URL: "
                "network connections do not survive a fork.\n"
                "For a DataLoader, choose multiprocessing_context='spawn' or 'forkserver' and open the cache in the "
                "worker; or call cache.view(...) before the workers start; or `logitcache pull` the cache first"
            )

    def _refuse_writing(self) -> None:
        if not self.can_write:
            raise UsageError(
                f"{self.url} is read-only, like every web server. Write to the directory that it serves, or to s3://, "
                "gs:// or az://"
            )

    def _refuse_listing(self) -> None:
        if not self.can_list:
            raise StorageError(
                f"{self.url} can't be listed, like every web server: open a sealed cache there by its full URL"
            )

    def _error(self, action: str, key: str, error: Exception) -> StorageError:
        reason = _reason(error)
        remedy = _s3_remedy(error, self._store.config) if self._scheme == "s3" else None
        if remedy is not None:
            reason = f"{remedy}. {reason}"
        elif isinstance(error, exceptions.PermissionDeniedError | exceptions.UnauthenticatedError):
            reason = f"access denied; check the credentials ({_CREDENTIALS[self._scheme]}). {reason}"
        elif _lacks_bucket(error) or isinstance(error, FileNotFoundError) or "status code: 404" in reason:
            reason = f"no such bucket or container. {reason}"
        return StorageError(f"can't {action} {self.url}/{key}: {reason}")


_CREDENTIALS = {
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or other Azure credentials",
    "https": "none are sent to web servers",
    "http": "none are sent to web servers",
    "memory": "none",
}


def _connect(scheme: str, url: str) -> Any:
    options: Any = {
        "timeout": timedelta(seconds=REQUEST_SECONDS),
        "read_timeout": timedelta(seconds=READ_SECONDS),
        "connect_timeout": timedelta(seconds=10),
        "user_agent": "logitcache",
    }
    if scheme in READ_ONLY:
        return store.HTTPStore(url, client_options=options | {"allow_http": scheme == "http"}, retry_config=_RETRY)
    if scheme == "gs":
        return store.GCSStore.from_url(url, client_options=options, retry_config=_RETRY)
    if scheme == "az":
        return store.AzureStore.from_url(url, client_options=options, retry_config=_RETRY)
    config: Any
    config, provider = _aws_settings()
    endpoint = _endpoint(config)
    if endpoint and not endpoint.startswith(("http://", "https://")):
        raise UsageError(f"AWS_ENDPOINT_URL is {endpoint!r}; expected a URL that begins with http:// or https://")
    if endpoint.startswith("http://"):
        options["allow_http"] = True
    # The store checks each object against the SHA-256 in the request before it becomes visible.
    config["checksum_algorithm"] = "SHA256"
    return store.S3Store.from_url(
        url, config=config, client_options=options, retry_config=_RETRY, credential_provider=provider
    )


def _aws_settings() -> tuple[dict[str, Any], Any]:
    """Settings beyond the environment variables: boto3's credentials, region and endpoint, or unsigned requests."""
    config: dict[str, Any] = {}
    keys = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    lacking = [name for name in keys if not os.environ.get(name)]
    if len(lacking) == 1 and "AWS_PROFILE" not in os.environ:
        there = next(name for name in keys if name not in lacking)
        raise UsageError(f"{there} is set, but {lacking[0]} is not; set both, or AWS_PROFILE instead")
    if "AWS_ACCESS_KEY_ID" in os.environ and "AWS_PROFILE" not in os.environ:
        return config, None
    try:
        import boto3
        from botocore.exceptions import BotoCoreError
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError:
        if "AWS_PROFILE" in os.environ:
            raise UsageError(
                "AWS_PROFILE is set, and profiles are read by boto3: pip install 'logitcache[remote]'"
            ) from None
        return config, None
    try:
        session = boto3.Session()
        if session.get_credentials() is None:
            return {"skip_signature": True}, None
        client = session.client("s3", region_name=session.region_name or "us-east-1")
    except BotoCoreError as error:
        raise UsageError(f"AWS credentials can't be read: {error}") from error
    endpoint = str(client.meta.endpoint_url)
    if not (urlsplit(endpoint).hostname or "").endswith("amazonaws.com"):
        config["endpoint"] = endpoint
    if session.region_name:
        config["region"] = session.region_name
    return config, Boto3CredentialProvider(session)


def _endpoint(config: Mapping[str, Any]) -> str:
    """The S3 endpoint; empty for AWS."""
    named = config.get("endpoint") or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return str(named or "")


def _s3_remedy(error: Exception, config: Mapping[str, Any]) -> str | None:
    """Which S3 setting an error points to, and what to set; None where it is unclear."""
    text, endpoint = str(error), _endpoint(config)
    at = f"at {endpoint} (AWS_ENDPOINT_URL)" if endpoint else "at AWS"
    elsewhere = "" if endpoint else "; for a store that is not AWS set AWS_ENDPOINT_URL"
    if "AuthorizationHeaderMalformed" in text or "redirect without LOCATION" in text:
        region = config.get("region") or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        known = re.search(r"<Region>([\w-]+)</Region>", text)
        set_to = known[1] if known else "the bucket's region"
        return f"wrong region: set AWS_REGION to {set_to} (now {region or 'not set, so us-east-1'})"
    if "status code: 400" in text and "performing HEAD" in text:  # the response has no body
        return "the request was refused without a reason: check AWS_REGION, then whether the credentials have expired"
    if "ExpiredToken" in text:
        return "the credentials have expired: log in again, or set a new AWS_SESSION_TOKEN"
    if isinstance(error, exceptions.PermissionDeniedError | exceptions.UnauthenticatedError):
        if config.get("skip_signature"):
            missing = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
            return f"access denied, and no credentials are set: set {missing}{elsewhere}"
        if "InvalidAccessKeyId" in text:
            return f"access denied: unknown access key {at}; check AWS_ACCESS_KEY_ID{elsewhere}"
        if "SignatureDoesNotMatch" in text:
            return "access denied: the secret key is wrong; check AWS_SECRET_ACCESS_KEY"
        return f"access denied {at}: these credentials (AWS_ACCESS_KEY_ID or AWS_PROFILE) lack permission{elsewhere}"
    if _lacks_bucket(error) or "status code: 404" in text:
        return f"no such bucket {at}: check its name in the URL{elsewhere}"
    if "error sending request" in text:
        setting = "AWS_ENDPOINT_URL" if endpoint else "the network"
        return f"no response from {endpoint or 'AWS'}: check {setting}{elsewhere}"
    return None


def _with_timeout(seconds: float, begin: Callable[[], Awaitable[Any]]) -> Any:
    """A result of obstore within a time limit: obstore skips empty pages, and a store may send nothing else.

    Raises:
        TimeoutError: the time is over.
    """

    async def wait() -> Any:
        return await asyncio.wait_for(begin(), max(seconds, 0.0))

    # In a thread, since the caller may run an event loop.
    with ThreadPoolExecutor(1) as threads:
        try:
            return threads.submit(lambda: asyncio.run(wait())).result()
        except TimeoutError:
            raise TimeoutError("it doesn't end, or the server is too slow") from None


def _is_transient(error: Exception) -> bool:
    """Whether repeating a request may help: after an incomplete response, but not after a refusal."""
    return "status code: 4" not in str(error) or "status code: 429" in str(error)


def _lacks_conditional_writes(error: BaseException | None) -> bool:
    """Whether a store doesn't support conditional writes."""
    return isinstance(error, exceptions.NotSupportedError) or "status code: 501" in str(error)


def _lacks_bucket(error: Exception) -> bool:
    return any(code in str(error) for code in ("NoSuchBucket", "ContainerNotFound"))


def _reason(error: Exception) -> str:
    """The message of an error, without the server's page, with the reason of the operating system."""
    text = str(error)
    line = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    reasons = re.findall(r'\b(?:message|error): "([^"]+)"', text)
    return line.partition("<")[0].rstrip(": ")[:300] + (f" ({reasons[-1]})" if reasons else "")
