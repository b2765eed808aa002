"""Actors of a Ray cluster, each with the teacher loaded, take blocks from a queue.

Ray places the actors, and starts one whose process or node died again where there is room. This process, the driver,
neither loads data nor teacher: it counts what is committed, and gives blocks that failed or were lost to others.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from logitcache.cache.layout import Block
from logitcache.cache.reader import open_cache
from logitcache.cache.sealing import seal
from logitcache.engines.protocol import CacheResult, Engine, Job, Worker
from logitcache.errors import LogitCacheError, NotACache, UsageError
from logitcache.progress import Meter, silence, track

RETRIES = 2
"""Further attempts after the first failure of a block. The last one computes it alone (`Item.alone`)."""
FAILING_BLOCKS = 100
"""Different blocks that fail without a commit in between, after which the build ends: the store fails, for example."""
SHOWN_BLOCKS = 5
"""Failed blocks that an error message names."""
LOOK_SECONDS = 5.0
"""Between two looks at the nodes of the cluster."""


@dataclass(frozen=True, kw_only=True)
class Ray(Engine):
    """Actors on an existing Ray cluster, or on one that is started on this machine for this run."""

    name: ClassVar[str] = "ray"
    address: str | None = None
    """Of the cluster; by default `RAY_ADDRESS`, or else a cluster that runs on this machine, or else a new one."""
    workers: int | None = None
    """Actors; by default as many as the nodes have room for, including nodes that join later."""
    num_cpus: float = 1
    """CPUs that an actor reserves; torch uses as many threads."""
    num_gpus: float | None = None
    """GPUs that an actor reserves; by default 1 if a node has any, otherwise 0."""

    def __post_init__(self) -> None:
        if self.workers is not None and (not isinstance(self.workers, int) or self.workers < 1):
            raise UsageError(f"workers is {self.workers!r}; expected a number of 1 or more")
        if not isinstance(self.num_cpus, int | float) or not self.num_cpus > 0:
            raise UsageError(f"num_cpus is {self.num_cpus!r}; expected a number above 0")
        if self.num_gpus is not None and (not isinstance(self.num_gpus, int | float) or self.num_gpus < 0):
            raise UsageError(f"num_gpus is {self.num_gpus!r}; expected 0 or more")

    def run(self, job: Job) -> CacheResult:
        # Ray prints what nodes and workers print; standard output is for the result of a command.
        with redirect_stdout(sys.stderr), _connected(self.address) as ray:
            build = _Build(ray, self, job)
            try:
                return build.run()
            finally:
                build.stop()


@contextmanager
def _connected(address: str | None) -> Iterator[Any]:
    """The module `ray`, connected to a cluster; a connection that the caller made is used and kept.

    Raises:
        UsageError: Ray is not installed, or there is no such cluster.
    """
    try:
        import ray
    except ImportError as error:
        raise UsageError(f"the engine 'ray' needs Ray ({error}): pip install 'logitcache[ray]'") from error
    if ray.is_initialized():
        yield ray
        return
    try:
        ray.init(address=address)
    except (ConnectionError, ValueError) as error:
        where = address or os.environ.get("RAY_ADDRESS") or "this machine"
        raise UsageError(
            f"no Ray cluster at {where}: {error}. Start one with `ray start --head`, or correct `address` or "
            "RAY_ADDRESS; without either, Ray is started on this machine"
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


class Created(NamedTuple):
    """An opened cache."""

    url: str
    all_blocks: list[Block]
    missing_blocks: list[Block]
    together: int
    """Of its worker."""


class Item(NamedTuple):
    """Blocks in the queue that one actor takes: of the same samples, so that it loads each sample once."""

    blocks: Sequence[Block]
    alone: bool = False
    """Whether its only block is computed by itself, so that no other block can make it fail."""

    def plain(self) -> tuple[list[str], bool]:
        """As it is queued: of built-in types, so that the process of the queue imports no logitcache and no torch."""
        return [block.name for block in self.blocks], self.alone


class Outcome(NamedTuple):
    """What an actor reports while it computes blocks."""

    node: str
    """Ray's id of its node."""
    block: Block | None = None
    """None in the first report: the actor has opened the cache, and takes blocks from now on."""
    error: str | None = None
    """None if the block is committed."""


class BlockActor:
    """A process of the cluster that has data and teacher loaded.

    Args:
        job: what to compute.
        folder: the working directory of the driver.
    """

    def __init__(self, job: Job, folder: str) -> None:
        self._job = job
        self._folder = folder
        self._worker: Worker | None = None
        self._is_open = False

    def load(self) -> None:
        """Load data and teacher, and check them.

        Raises:
            LogitCacheError: they are not available on this node.
        """
        self._loaded()

    def create(self) -> Created:
        """Open the cache; create it if it does not exist."""
        worker = self._opened()
        return Created(worker.storage.url, worker.all_blocks(), worker.missing_blocks(), worker.together)

    def compute(self, queue: Any) -> Iterator[Outcome]:
        """Compute blocks until the queue is empty.

        Args:
            queue: of items in their plain form. The blocks of consecutive items are rendered ahead of the teacher, so
                an error may belong to any of those that were taken; it is reported for all that are not committed.

        Raises:
            Exception: of the last error. The actor should be replaced: its GPU, for example, may be unusable.
        """
        if not self._is_open and not self._loaded().is_created():
            raise UsageError(
                f"the cache {self._loaded().storage.url} was created, but this node does not see it; "
                "set cache.path to a folder that all nodes share, or to a URL such as s3://…"
            )
        worker = self._opened()
        silence()  # the driver shows the progress of all
        yield Outcome(_node())
        for alone, items in itertools.groupby(_drained(queue), lambda item: item.alone):
            blocks = (block for item in items for block in item.blocks)
            for together in ([block] for block in blocks) if alone else [blocks]:
                yield from _computed(worker, together)

    def _loaded(self) -> Worker:
        if self._worker is None:
            copied = _has_own_working_directory()
            if not copied:
                try:
                    os.chdir(self._folder)
                except OSError as error:
                    raise UsageError(
                        f"this node has no folder {self._folder}, in which the build was started ({error.strerror}); "
                        "start it in a folder that all nodes share, or let Ray copy the folder to the nodes: "
                        "ray job submit --working-dir . -- logitcache cache-teacher …"
                    ) from error
            worker = self._job.load()
            url = worker.storage.url
            if copied and not worker.storage.is_remote and Path(url).resolve().is_relative_to(Path.cwd().resolve()):
                raise UsageError(
                    f"cache.path is {url}, in the copy of the working directory that Ray deletes at the end of the "
                    "job; set it to an absolute path that all nodes share, or to a URL such as s3://…"
                )
            self._worker = worker
        return self._worker

    def _opened(self) -> Worker:
        worker = self._loaded()
        if not self._is_open:
            worker.open()
            self._is_open = True
        return worker


def _has_own_working_directory() -> bool:
    """Whether Ray copied the working directory of the job to this node."""
    import ray

    return "working_dir" in ray.get_runtime_context().runtime_env


def _node() -> str:
    import ray

    return str(ray.get_runtime_context().get_node_id())


def _drained(queue: Any) -> Iterator[Item]:
    """Take items until the queue is empty."""
    from ray.util.queue import Empty

    while True:
        try:
            names, alone = queue.get_nowait()
        except Empty:
            return
        yield Item([Block.from_name(name) for name in names], alone)


def _computed(worker: Worker, blocks: Iterable[Block]) -> Iterator[Outcome]:
    """Compute blocks, and report each as soon as it is committed."""
    node, taken = _node(), dict[Block, None]()

    def take() -> Iterator[Block]:
        for block in blocks:
            taken[block] = None
            yield block

    try:
        for block in worker.compute_each(take(), drawn_from=()):
            del taken[block]
            yield Outcome(node, block)
    except Exception as error:
        for block in taken:
            yield Outcome(node, block, f"{type(error).__name__}: {error}")
        raise


class _Failure(NamedTuple):
    error: str
    nodes: frozenset[str] = frozenset()
    """If workers died: their nodes. It is no failure of the block if none of these nodes is alive any more."""


class _Build:
    """One run of the engine: its actors, and the state of the blocks.

    Raises:
        UsageError: no node has room for an actor.
    """

    def __init__(self, ray: Any, engine: Ray, job: Job) -> None:
        from ray.util.queue import Queue
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self._ray = ray
        self._workers = engine.workers
        gpus = engine.num_gpus
        if gpus is None:
            gpus = 1 if any("GPU" in resources for resources in self._nodes().values()) else 0
        self._needs = {"CPU": engine.num_cpus, "GPU": gpus}
        actor = ray.remote(BlockActor).options(
            num_cpus=engine.num_cpus, num_gpus=gpus, max_restarts=-1, max_task_retries=0
        )
        self._new_actor: Callable[[], Any] = lambda: actor.remote(job, str(Path.cwd()))
        wanted = self._wanted()
        if not wanted:
            raise UsageError(
                f"no node of the Ray cluster has {engine.num_cpus} CPUs and {gpus} GPUs for a worker; the nodes have "
                f"{list(self._nodes().values())}. Change num_cpus or num_gpus, or set workers to wait for nodes that "
                "an autoscaler starts"
            )
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        # Before the actors: Ray starts only a few processes at a time, and no block is computed without the queue.
        self._queue = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
        self._actors = [self._new_actor() for _ in range(wanted)]
        self._refused = 0
        """Actors that could not load data or teacher, or open the cache."""
        self._running: dict[Any, Any] = {}
        """Actors by the generator of their outcomes."""
        self._node_of: dict[Any, str] = {}
        """The node of each running actor that has opened the cache, by its generator."""
        self._idle: list[Any] = []
        """Actors that found the queue empty."""
        self._lost_on: dict[str, str] = {}
        """Why workers died that may have taken blocks, by node; until these blocks are given to others."""
        self._missing: set[Block] = set()
        """Blocks that are neither committed nor given up."""
        self._failures: dict[Block, list[_Failure]] = {}
        self._failing: set[Block] = set()
        """Blocks that failed since the last commit."""
        self._given_up: dict[Block, str] = {}
        self._computed: list[Block] = []

    def run(self) -> CacheResult:
        created = self._create()
        try:
            cache = open_cache(created.url)
        except NotACache as error:
            raise UsageError(
                f"a worker created the cache {created.url}, but this machine does not see it; set cache.path to a "
                "folder that it shares with all nodes, or to a URL such as s3://…"
            ) from error
        rows = cache.row_map
        self._missing = set(created.missing_blocks)
        groups = itertools.groupby(created.missing_blocks, lambda block: (block.number, block.view // created.together))
        self._queue.put_nowait_batch([Item(list(group)).plain() for _, group in groups])
        total = sum(len(rows.block_rows(block.number)) for block in created.missing_blocks)
        with track("caching the teacher", total, unit="rows") as meter:
            for actor in self._actors:
                self._start(actor)
            next_look = 0.0
            while self._missing and len(self._failing) < FAILING_BLOCKS:
                if time.monotonic() > next_look:
                    self._start_actors_on_new_nodes()
                    next_look = time.monotonic() + LOOK_SECONDS
                ready, _ = self._ray.wait(list(self._running), timeout=LOOK_SECONDS, fetch_local=False)
                for generator in ready:
                    outcome = self._next(generator)
                    if outcome is not None and outcome.block is not None:
                        self._count(outcome.block, outcome.error, meter, len(rows.block_rows(outcome.block.number)))
                if not self._node_of and (self._idle or self._lost_on):
                    self._give_lost_blocks_to_others()
        if self._given_up or self._missing:
            raise LogitCacheError(self._described())
        return CacheResult(seal(created.url).manifest, self._computed, len(created.all_blocks))

    def stop(self) -> None:
        for actor in [*self._actors, self._queue.actor]:
            self._ray.kill(actor)

    def _create(self) -> Created:
        """Let the first actor that has loaded data and teacher open the cache; the others load meanwhile.

        Raises:
            Exception: no actor can load them, or the cache can't be opened.
        """
        errors = self._ray.exceptions
        loading = {actor.load.remote(): actor for actor in self._actors}
        failed: list[tuple[Any, Exception]] = []
        while loading:
            [loaded], _ = self._ray.wait(list(loading))
            actor = loading.pop(loaded)
            has_loaded = False
            try:
                self._ray.get(loaded)
                has_loaded = True
                created: Created = self._ray.get(actor.create.remote())
            except errors.RayTaskError as error:
                if has_loaded:
                    raise error.cause from error
                failed.append((actor, error.cause))
                continue
            except errors.ActorUnavailableError:  # Ray starts it again
                loading[actor.load.remote()] = actor
                continue
            except errors.RayError as error:
                raise LogitCacheError(f"Ray can't start a worker: {error}") from error
            for actor, cause in failed:
                self._refuse(actor, cause)
            return created
        raise failed[-1][1]

    def _nodes(self) -> dict[str, dict[str, float]]:
        """The resources of each living node, by its id."""
        return {node["NodeID"]: node["Resources"] for node in self._ray.nodes() if node["Alive"]}

    def _wanted(self) -> int:
        """How many actors there should be."""
        if self._workers is not None:
            return self._workers
        needs = {kind: need for kind, need in self._needs.items() if need}
        return sum(
            min(int(resources.get(kind, 0) // need) for kind, need in needs.items())
            for resources in self._nodes().values()
        )

    def _start_actors_on_new_nodes(self) -> None:
        number = min(self._wanted() - self._refused, len(self._missing)) - len(self._actors)
        for actor in [self._new_actor() for _ in range(number)]:
            self._actors.append(actor)
            self._start(actor)

    def _start(self, actor: Any) -> None:
        generator = actor.compute.options(num_returns="streaming").remote(self._queue)
        self._running[generator] = actor

    def _next(self, generator: Any) -> Outcome | None:
        """The next outcome of an actor; None if it is idle or was replaced.

        Raises:
            Exception: no actor can open the cache.
        """
        errors = self._ray.exceptions
        try:
            outcome: Outcome = self._ray.get(next(generator))
            self._node_of[generator] = outcome.node
            return outcome
        except StopIteration:
            del self._node_of[generator]
            self._idle.append(self._running.pop(generator))
            return None
        except errors.RayError as error:
            actor, node = self._running.pop(generator), self._node_of.pop(generator, None)
            failed = isinstance(error, errors.RayTaskError)
            if node is None and not isinstance(error, errors.ActorUnavailableError):
                self._refuse(actor, error.cause if failed else error)
                return None
            if node is not None and not failed:
                self._lost_on[node] = " ".join(str(error).split())
            if failed or isinstance(error, errors.ActorDiedError):  # its process may be unusable, or is gone for ever
                self._ray.kill(actor)
                self._actors.remove(actor)
                actor = self._new_actor()
                self._actors.append(actor)
            self._start(actor)
            return None

    def _refuse(self, actor: Any, error: Exception) -> None:
        """Do without an actor that can't load data or teacher, or open the cache.

        Raises:
            Exception: it was the last one.
        """
        self._ray.kill(actor)
        self._actors.remove(actor)
        self._refused += 1
        if not self._actors:
            raise error
        message = f"a worker can't be used: {type(error).__name__}: {error}. The others compute its blocks"
        warnings.warn(message, RuntimeWarning, stacklevel=2)

    def _count(self, block: Block, error: str | None, meter: Meter, num_rows: int) -> None:
        if block not in self._missing:
            return  # a worker that was thought dead has computed it as well
        if error is not None:
            self._failed(block, _Failure(error))
            return
        self._missing.remove(block)
        self._failing.clear()
        self._computed.append(block)
        failed = f", {len(self._given_up)} blocks failed" if self._given_up else ""
        workers = len(self._node_of)
        meter.advance(num_rows, note=f"{workers} {'worker' if workers == 1 else 'workers'}{failed}")

    def _failed(self, block: Block, failure: _Failure) -> None:
        """Queue a block again, or give it up."""
        self._failing.add(block)
        self._failures.setdefault(block, []).append(failure)
        alive = self._nodes().keys()
        counted = [each for each in self._failures[block] if not each.nodes or each.nodes & alive]
        if len(counted) > RETRIES:
            self._given_up[block] = failure.error
            self._missing.remove(block)
        else:
            self._queue.put_nowait(Item([block], alone=len(counted) == RETRIES).plain())
            self._start_idle_actors()

    def _give_lost_blocks_to_others(self) -> None:
        """No actor computes anything: blocks that are not in the queue were lost with workers that stopped."""
        queued = self._queue.get_nowait_batch(self._queue.qsize())
        self._queue.put_nowait_batch(queued)
        lost = self._missing - {Block.from_name(name) for names, _ in queued for name in names}
        if self._lost_on:
            failure = _Failure(f"its worker died ({'; '.join(self._lost_on.values())})", frozenset(self._lost_on))
            self._lost_on = {}
            for block in sorted(lost):
                self._failed(block, failure)
        else:  # taken by a worker that then reported a failure of another block
            self._queue.put_nowait_batch([Item([block]).plain() for block in sorted(lost)])
        self._start_idle_actors()

    def _start_idle_actors(self) -> None:
        while self._idle:
            self._start(self._idle.pop())

    def _described(self) -> str:
        """The error message for blocks that failed."""
        failed = self._given_up or {block: self._failures[block][-1].error for block in sorted(self._failing)}
        shown = "\n".join(f"  {block.name}: {error}" for block, error in list(failed.items())[:SHOWN_BLOCKS])
        more = f"\n  and {len(failed) - SHOWN_BLOCKS} more" if len(failed) > SHOWN_BLOCKS else ""
        early = f", of which {len(self._missing)} were left out because {FAILING_BLOCKS} failed in a row"
        return (
            f"{len(self._given_up) + len(self._missing)} blocks are not computed{early if self._missing else ''}; "
            f"a block is tried {RETRIES + 1} times.\n{shown}{more}\n"
            f"The {len(self._computed)} blocks that were computed are kept. Correct the cause and run the same command "
            "again to compute the others."
        )
