"""Workers on two NFS clients with separate kernels build one cache: the cache is that of a single process.

Three guests of user-mode Linux run on this machine: an NFS server (the kernel's, on ext4) and two clients, which mount
its folder with the default options. The guests see the files of this machine, read-only. A guest that is killed loses
its kernel, as a node that loses power. KVM is not needed.

It needs root, and the Debian packages `user-mode-linux`, `nfs-kernel-server` (without a running service) and
`busybox`. While it runs, `vm.max_map_count` is raised, since a guest needs an entry for each page. A tiny run has
processes and a local folder in place of guests and NFS.

    python benchmarks/nfs.py --write
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import yaml
from measuring import conditions, fresh_folder, options, parse, table, write_result

import logitcache
from logitcache.cli import main as command_line
from logitcache.engines import Claiming
from logitcache.progress import silence
from logitcache.storage.folder_lock import locked_folder
from logitcache.verify.audit import verify
from tests.conftest import FEW_DIGITS, tiny_settings
from tests.durability.test_engines import DATA, Log, Role, watch

LIMIT_SECONDS = 900
LEASE_SECONDS = 90
"""After which the server gives the locks of a client that it no longer hears to others; nfsd's default."""

INIT = """#!/bin/sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/run TMPDIR=/run OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=1
mount -t proc p /proc; mount -t sysfs s /sys; mount -t tmpfs t /run; mount -t tmpfs t /var/lib/nfs
mkdir /dev/shm; mount -t tmpfs t /dev/shm
for each in $(cat /proc/cmdline); do case $each in guest.*) export "${each#guest.}";; esac; done
hostname $name; ip link set lo up; ip address add $address/24 dev eth0; ip link set eth0 up
load() {
  modules=/usr/lib/uml/modules/$(uname -r); order=
  for each in $(grep "/$1.ko:" $modules/modules.dep | tr -d :); do order="$each $order"; done
  for each in $order; do busybox insmod $modules/$each 2> /dev/null; done
}
mount -t hostfs -o $shared none $shared
if [ $name = server ]; then
  load nfsd; mount /dev/ubda /mnt; mount -t nfsd nfsd /proc/fs/nfsd
  (cd /var/lib/nfs; mkdir -p sm sm.bak v4recovery; touch etab rmtab state)
  rpcbind -w; rpc.statd --no-notify
  exportfs -o rw,no_root_squash,no_subtree_check,sync,insecure,fsid=0 '*:/mnt'
  rpc.mountd; rpc.nfsd -G 10 -L $lease 4
else
  load nfsv4; until mount -t nfs -o vers=4.2 10.0.0.1:/ /mnt; do sleep 0.5; done
fi
cd $shared/$name
grep ' /mnt ' /proc/mounts > mounted; uname -sr > kernel
export PYTHONPATH HOME
exec $python -c 'import sys; sys.path.append("'$scripts'"); import nfs; nfs.agent("'$shared/$name'")'
"""


class Task:
    """What an agent runs in a process of its own."""

    def __init__(self, stem: Path) -> None:
        self._output, self._ended = stem.with_suffix(".out"), stem.with_suffix(".ended")

    def code(self) -> int:
        """The exit code, after waiting for the end."""
        wait_until(self.has_ended, self._output)
        return int(self._ended.read_text())

    def has_ended(self) -> bool:
        return self._ended.exists()

    def result(self) -> str:
        """The last line of its output; it must have ended well."""
        if self.code():
            raise RuntimeError(self.output())
        return (self.output().splitlines() or [""])[-1]

    def output(self) -> str:
        return self._output.read_text()[-4000:]


class Machine:
    """An agent in a process of this machine, with a local folder in place of NFS."""

    def __init__(self, shared: Path, name: str, mount: Path) -> None:
        self.folder, self.mount = shared / name, mount
        self.folder.mkdir()
        self._numbers = itertools.count()
        self._pid: int | None = None
        self._join: Callable[[], Any] = lambda: None

    def boot(self) -> None:
        process = get_context("fork").Process(target=agent, args=(str(self.folder),))
        process.start()
        with contextlib.suppress(PermissionError):  # done already
            os.setpgid(process.pid or 0, process.pid or 0)
        self._pid, self._join = process.pid, process.join

    def start(self, function: Callable[..., None], *arguments: str) -> Task:
        stem = self.folder / f"{next(self._numbers)}"
        stem.with_suffix(".new").write_text(json.dumps([function.__name__, arguments]))
        stem.with_suffix(".new").rename(stem.with_suffix(".task"))
        return Task(stem)

    def kill(self) -> None:
        """With all that runs on it; a guest is like a node that loses power: the server hears nothing."""
        if self._pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._pid, signal.SIGKILL)
            self._join()

    def about(self) -> str:
        return "a process of this machine, a local folder"


class Guest(Machine):
    """A kernel of user-mode Linux; its files are those of this machine, read-only, and a shared folder."""

    def __init__(self, shared: Path, name: str, number: int, mebibytes: int, *devices: str) -> None:
        super().__init__(shared, name, Path("/mnt"))
        init = shared / "init"
        init.write_text(INIT)
        init.chmod(0o755)
        here = Path(__file__).parent
        parameters = {
            "name": name,
            "address": f"10.0.0.{number}",
            "shared": shared,
            "python": sys.executable,
            "scripts": here,
            "PYTHONPATH": here.parent,
            "lease": LEASE_SECONDS,
        }
        self._command = [
            *("linux.uml", f"mem={mebibytes}M", "root=/dev/root", "rootfstype=hostfs", "rootflags=/", "ro", "quiet"),
            *(f"init={init}", "con=null", "con0=null,fd:1", *devices),
            f"eth0=mcast,52:54:00:00:00:0{number},239.192.168.1,1102,0",
            *(f"guest.{key}={value}" for key, value in parameters.items()),
        ]

    def boot(self) -> None:
        with (self.folder / "console").open("wb") as console:
            process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=console, stderr=console, start_new_session=True
            )
        self._pid, self._join = process.pid, process.wait

    def about(self) -> str:
        return f"{(self.folder / 'kernel').read_text().strip()}, `{(self.folder / 'mounted').read_text().strip()}`"


# What runs on the machines.


def agent(folder: str) -> None:
    """Run tasks that are files in a folder, each in a process of its own."""
    preload()
    running: dict[int, Path] = {}
    while True:
        for task in Path(folder).glob("*.task"):
            begun = task.rename(task.with_suffix(".begun"))
            running[fork(_run_task, begun)] = begun
        with contextlib.suppress(ChildProcessError):
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid in running:
                code = running[pid].with_suffix(".code")
                code.write_text(str(os.waitstatus_to_exitcode(status)))
                code.rename(running.pop(pid).with_suffix(".ended"))
        time.sleep(0.05)


def preload() -> None:
    """Import what the stages import when they need it: in a guest it takes a minute."""
    for name in ("torchvision.transforms.v2", "sklearn.datasets", "torch.utils.tensorboard"):
        importlib.import_module(name)
    for name in ("cache_teacher", "train_student"):
        importlib.import_module(f"logitcache.stages.{name}")


def fork(function: Callable[..., None], *arguments: Any) -> int:
    """Run a function in a child, whose exit code tells whether it failed."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code: Any = 1
    try:
        function(*arguments)
        code = 0
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def wait_for(children: list[int]) -> None:
    """Fail if one of them has failed."""
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    sys.exit(max(codes, key=abs))


def _run_task(begun: Path) -> None:
    descriptor = os.open(begun.with_suffix(".out"), os.O_WRONLY | os.O_CREAT, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    name, arguments = json.loads(begun.read_text())
    globals()[name](*arguments)


def command(*arguments: str) -> None:
    """A command of logitcache."""
    sys.argv = ["logitcache", *arguments]
    command_line()


def workers(log: str, names: str, *arguments: str) -> None:
    """Several processes with the same command, which log the blocks that they begin and commit."""
    wait_for([fork(_work, log, name, arguments) for name in names.split(",")])


def _work(log: str, name: str, arguments: Sequence[str]) -> None:
    watch(Log(Path(log)), Role(name, Claiming()))
    command(*arguments)


def check(path: str) -> None:
    """Print the digest and the problems of a cache."""
    silence()
    print(json.dumps([logitcache.open(path).digest, list(map(str, verify(path, deep=True)))]))


def results(folder: str) -> None:
    """Print what finished runs state, apart from times."""
    found = {}
    for path in sorted(Path(folder).rglob("result.json")):
        result = json.loads(path.read_text())
        found[str(path.relative_to(folder))] = {key: value for key, value in result.items() if "seconds" not in key}
    print(json.dumps(found))


def count(folder: str, processes: str, rounds: str) -> None:
    """Processes that increase a number in a file, under the folder's lock; prints the number."""
    wait_for([fork(_count, Path(folder), int(rounds)) for _ in range(int(processes))])


def _count(folder: Path, rounds: int) -> None:
    number = folder / "number"
    for _ in range(rounds):
        with locked_folder(folder):
            number.write_text(str(1 + (int(number.read_text()) if number.exists() else 0)))


def show(path: str) -> None:
    """Print a text file."""
    print(Path(path).read_text())


def hold(log: str, name: str, folder: str, seconds: str) -> None:
    """Log that this process holds the lock of a folder."""
    Path(folder).mkdir(exist_ok=True)
    Log(Path(log)).write(name, "waits lock")
    with locked_folder(Path(folder)):
        Log(Path(log)).write(name, "holds lock")
        time.sleep(float(seconds))


# The cases.


def wait_until(condition: Callable[[], bool], what: object) -> None:
    start = time.monotonic()
    while not condition():
        if time.monotonic() - start > LIMIT_SECONDS:
            raise TimeoutError(f"nothing for {LIMIT_SECONDS} seconds: {what}")
        time.sleep(0.05)


class Site:
    """The machines, and what is measured on them."""

    def __init__(self, shared: Path, server: Machine, clients: list[Machine], overrides: Sequence[str]) -> None:
        self.shared, self.server, self.clients, self._overrides = shared, server, clients, overrides
        self.failures = 0
        self.rows: list[list[object]] = []
        """Of caches."""
        self.facts: list[list[object]] = []
        """Of locks and students."""
        single = Machine(shared, "single", shared)
        single.boot()
        try:
            pipeline = self.pipeline(single, "alone")
            single.start(command, "cache-teacher", pipeline).result()
            self.digest, _ = json.loads(single.start(check, f"{shared}/alone/tiny.cache").result())
            single.start(command, "train-student", pipeline).result()
            self.students = single.start(results, f"{shared}/alone/runs").result()
        finally:
            single.kill()

    def pipeline(self, machine: Machine, case: str) -> str:
        """The tiny pipeline, with cache and runs in a folder of a machine's mount."""
        path = self.shared / f"{case}.yaml"
        path.write_text(yaml.safe_dump(tiny_settings(machine.mount / case, *self._overrides)))
        return str(path)

    def log(self, case: str) -> Log:
        log = Log(self.shared / f"log-{case}")
        log.folder.mkdir()
        return log

    def wait(self) -> None:
        """Until all machines have booted."""
        for task in [machine.start(show, "/dev/null") for machine in (self.server, *self.clients)]:
            task.code()

    def start(self, case: str, log: Log, *options: Sequence[str]) -> list[Task]:
        """Two workers on each client; the options of each client."""
        pipeline = self.pipeline(self.clients[0], case)
        names = [",".join(f"{machine.folder.name}-{number}" for number in range(2)) for machine in self.clients]
        return [
            machine.start(workers, str(log.folder), name, "cache-teacher", pipeline, *each)
            for machine, name, each in zip(self.clients, names, options, strict=True)
        ]

    def add_cache(self, case: str, log: Log, about: str, reader: Machine, killed: str | None = None) -> None:
        """Check a cache, from a client and from the server, and what the workers did."""
        tasks = [machine.start(check, f"{machine.mount}/{case}/tiny.cache") for machine in (reader, self.server)]
        digests, problems = zip(*(json.loads(task.result()) for task in tasks), strict=True)
        dead = [path.name for path in log.folder.iterdir() if killed and path.name.startswith(f"{killed}-")]
        lost = {block for name in dead for block in set(log.of(name, "start")) - set(log.of(name, "commit"))}
        starts, commits = log.all("start"), log.all("commit")
        repeated = {block for block, number in starts.items() if number > 1}
        same = {self.digest} == set(digests)
        self.failures += not same or any(problems) or (killed is not None and not repeated <= lost)
        survived = {name: len(log.of(name, "commit")) for name in sorted(path.name for path in log.folder.iterdir())}
        self.rows.append(
            [
                about,
                len(starts),
                " + ".join(map(str, survived.values())),
                len(lost) if killed else "",
                log.all("takeover").total(),
                len(repeated),
                "yes" if same else "no",
                sum(map(len, problems)),
            ]
        )
        print(self.rows[-1], commits.total(), *problems, flush=True)

    def add_fact(self, about: str, fact: object, good: bool = True) -> None:
        self.failures += not good
        self.facts.append([about, fact])
        print(self.facts[-1], flush=True)


def build_with_claims(site: Site, seconds: float) -> None:
    case = f"claims-{seconds:g}"
    log, choice = site.log(case), ["--engine", "claims", "--engine-option", f"seconds={seconds:g}"]
    for task in site.start(case, log, choice, choice):
        task.result()
    site.add_cache(case, log, f"claims, `seconds={seconds:g}`", site.clients[1])


def num_starts(log: Log, machine: Machine) -> int:
    """Blocks that the workers of a machine have begun."""
    paths = log.folder.glob(f"{machine.folder.name}-*")
    return sum(len(log.of(path.name, "start")) for path in paths)


def build_with_a_killed_client(site: Site, seed: int, seconds: float) -> None:
    draw, case = random.Random(seed), f"killed-{seed}"
    log, choice = site.log(case), ["--engine", "claims", "--engine-option", f"seconds={seconds:g}"]
    victim, begun, delay = draw.randrange(2), draw.randint(1, 15), draw.uniform(0, 0.3)
    tasks = site.start(case, log, choice, choice)
    killed, survivor = site.clients[victim], site.clients[1 - victim]
    wait_until(lambda: tasks[victim].has_ended() or num_starts(log, killed) >= begun, case)
    time.sleep(delay)
    killed.kill()
    start = time.monotonic()
    tasks[1 - victim].result()
    about = f"claims, {killed.folder.name} is killed; the other client ends {time.monotonic() - start:.0f} s later"
    killed.boot()
    site.add_cache(case, log, about, survivor, killed.folder.name)


def build_with_shards(site: Site) -> None:
    log = site.log("shards")
    pipeline = site.pipeline(site.clients[0], "shards")
    tasks = [
        machine.start(workers, str(log.folder), machine.folder.name, "cache-teacher", pipeline, "--shard", f"{index}/2")
        for index, machine in enumerate(site.clients)
    ]
    for task in tasks:
        task.result()
    site.clients[0].start(command, "seal", f"{site.clients[0].mount}/shards/tiny.cache").result()
    site.add_cache("shards", log, "`--shard 0/2` and `1/2`, then `seal`", site.clients[1])


def train_students(site: Site) -> None:
    """On the cache that the first client has just built."""
    one, two = site.clients
    for case in ("students", "twice"):
        pipeline = site.pipeline(one, case)
        one.start(command, "cache-teacher", pipeline).result()
        readers = [two] if case == "students" else [one, two]
        tasks = [machine.start(command, "train-student", pipeline) for machine in readers]
        codes = [task.code() for task in tasks]
        errors = [task.output().strip().splitlines()[-1] for task in tasks if task.code()]
        same = two.start(results, f"{two.mount}/{case}/runs").result() == site.students
        about = "`train-student` on one client, of a cache that the other has just written"
        if case == "twice":
            about = "two `train-student` at once, in one folder of runs"
        fact = f"exit codes {codes}; results {'as' if same else 'not as'} on a local disk {' '.join(errors)}"
        site.add_fact(about, fact, case == "twice" or (codes == [0] and same))


def lock_folders(site: Site, rounds: int) -> None:
    one, two = site.clients
    log, folder = site.log("lock"), f"{one.mount}/lock"
    holder = one.start(hold, str(log.folder), "holder", folder, "3600")
    wait_until(lambda: "holds" in log_text(log, "holder"), "lock")
    two.start(hold, str(log.folder), "other", folder, "0")
    wait_until(lambda: "waits" in log_text(log, "other"), "lock")
    time.sleep(5)
    site.add_fact(
        "5 s after one client has locked a folder, the other waits", "yes", "holds" not in log_text(log, "other")
    )
    one.kill()
    start = time.monotonic()
    wait_until(lambda: "holds" in log_text(log, "other"), holder)
    site.add_fact("the holder's client is killed; the other has the lock after", f"{time.monotonic() - start:.0f} s")
    one.boot()
    site.wait()
    tasks = [machine.start(count, folder, "2", str(rounds)) for machine in site.clients]
    start = time.monotonic()
    for task in tasks:
        task.result()
    number = two.start(show, f"{folder}/number").result()
    about = f"number after two processes on each client have added 1 under the lock, {rounds} times each"
    fact = f"{number}; expected {4 * rounds}; {(time.monotonic() - start) / (4 * rounds):.2f} s each"
    site.add_fact(about, fact, int(number) == 4 * rounds)


def log_text(log: Log, name: str) -> str:
    path = log.folder / name
    return path.read_text() if path.exists() else ""


@contextlib.contextmanager
def machines(shared: Path, tiny: bool) -> Iterator[tuple[Machine, list[Machine]]]:
    """A server and two clients, which are killed at the end."""
    if tiny:
        mount = shared / "mount"
        mount.mkdir()
        server, *clients = [Machine(shared, name, mount) for name in ("server", "one", "two")]
    else:
        disk = shared / "disk"
        with disk.open("wb") as file:
            file.truncate(2**31)
        subprocess.run(["mkfs.ext4", "-q", "-F", disk], check=True)
        server = Guest(shared, "server", 1, 1024, f"ubd0={disk}")
        clients = [Guest(shared, "one", 2, 2048), Guest(shared, "two", 3, 2048)]
    limit = Path("/proc/sys/vm/max_map_count")
    before = limit.read_text() if not tiny else ""
    try:
        if not tiny:
            limit.write_text("1000000")
        for machine in (server, *clients):
            machine.boot()
        yield server, list(clients)
    finally:
        for machine in (server, *clients):
            machine.kill()
        if not tiny:
            limit.write_text(before)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--kills", type=int, default=5, help="builds of which a client is killed")
    parser.add_argument("--seconds", type=float, default=70, help="after which claims expire in these builds")
    parser.add_argument("--rounds", type=int, default=50, help="of each process that takes the lock")
    parser.add_argument("--only", choices=["claims", "kills", "shards", "students", "locks"], help="one of the cases")
    arguments = parse(parser, kills=1, seconds=1.0, rounds=5)
    silence()
    os.chdir(Path(__file__).parents[1])
    os.environ["OMP_NUM_THREADS"] = "1"
    shared = fresh_folder()
    preload()
    overrides = FEW_DIGITS if arguments.tiny else [*DATA["images"], "data.name=digits", "cache.rows_per_block=64"]
    sections = ["# Two NFS clients", conditions()]
    print(sections[-1], flush=True)
    with machines(shared, arguments.tiny) as (server, clients):
        site = Site(shared, server, clients, overrides)
        cases: list[tuple[str, Callable[[], None]]] = [
            ("claims", lambda: build_with_claims(site, 4 if not arguments.tiny else 1)),
            *([] if arguments.tiny else [("claims", lambda: build_with_claims(site, 120))]),
            *[
                ("kills", lambda seed=seed: build_with_a_killed_client(site, seed, arguments.seconds))  # type: ignore[misc]
                for seed in range(arguments.kills)
            ],
            ("shards", lambda: build_with_shards(site)),
            ("students", lambda: train_students(site)),
            ("locks", lambda: lock_folders(site, arguments.rounds)),
        ]
        for name, case in cases:
            if arguments.only in (None, name):
                site.wait()
                case()
        about = [f"{machine.folder.name}: {machine.about()}" for machine in (server, *clients)]
    header = [
        "build",
        "blocks",
        "committed by each worker",
        "begun and not committed by killed workers",
        "expired claims taken over",
        "blocks begun more than once",
        "digest of one process",
        "problems of `verify --deep`",
    ]
    sections += ["\n".join(f"- {line}" for line in about), table(header, site.rows), table(["", ""], site.facts)]
    print("\n\n".join(sections[2:]), flush=True)
    if arguments.write:
        written = write_result("nfs", "\n\n".join(sections) + "\n", device=torch.device("cpu"))
        print(f"\nwritten to {written}")
    sys.exit(f"{site.failures} cases failed" if site.failures else 0)


if __name__ == "__main__":
    main()
