"""Streams of samples joined to a cache by key: views of samples that arrive in any order, without random access."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch.distributed
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from logitcache.cache.rendering import input_mismatch
from logitcache.data.batching import Batch, collate
from logitcache.data.samples import SampleTable, bytes_digest, input_digest, same_content
from logitcache.data.streamed import Fields, file_bytes, stream_item
from logitcache.data.text_views import INPUT_IDS
from logitcache.data.tokens import content_of_ids
from logitcache.data.views import Load, Renderer, ViewPlan, no_partner
from logitcache.data.workers import end_with_parent
from logitcache.errors import SampleMismatch, UsageError
from logitcache.randomness import preserved_generators

if TYPE_CHECKING:
    from logitcache.cache.reader import LogitCache

# N samples

CHUNK = 32
"""Samples that are rendered between two saves of the global generators, which the stream uses too."""
MAX_WORKERS = 256
NAME_BYTES = 1024
"""Of the keys that a worker names."""
SHOWN_KEYS = 5


class StreamViews(IterableDataset[tuple[int, Any, Any]]):
    """The samples of a stream as the teacher saw them, in the stream's order: items are (index, input, target).

    Each sample is found in the cache by its key, and rendered as `ViewDataset` renders it, bit for bit. The index
    contains view and row, for `cache.logits(index)`. Shuffling, and sharing the samples among DataLoader workers and
    DDP ranks, is the stream's part. A sample's content is compared with the cache when it is first seen, and when
    its key comes again. The proof samples of each view are compared with the digests of the teacher's inputs when they
    arrive.

    ```python
    views = logitcache.StreamViews(stream, cache)
    loader = DataLoader(views, batch_size=64, num_workers=4)
    for epoch in range(epochs):
        views.set_epoch(epoch)
        for index, inputs, targets in loader:
            teacher_logits = cache.logits(index)
        print(views.summary())
    ```

    Args:
        stream: an iterable of (key, sample, target) or (key, sample), or of mappings; often an `IterableDataset`. With
            DataLoader workers, each worker iterates over its own copy.
        cache: made with `samples=`, so that it has keys. A cache whose samples have no keys is joined by position.
        plan: how the views are made, compared with the cache's; by default `cache.view_plan`.
        preprocess: the model's deterministic preprocessing; by default the plan's, which is the teacher's.
        cycle: view numbers that `set_epoch` cycles through; by default those of the cache.
        fields: names of key, sample and target in the stream's mappings, such as ("__key__", "jpg", "cls"). None as the
            last name takes the targets from the cache.
        decode: makes an input of a sample's bytes, such as `decode_image`. The bytes are then the sample's content. A
            mapping with `bytes`, as Hugging Face has for images, counts as these.
        missing: what happens to a sample that the cache lacks: "error", or "skip" to leave it out.
        repeated: what happens to a sample that comes again before the next `set_epoch`: "keep" renders it again, "skip"
            leaves it out (exact only within one worker), "error" refuses it.
        partner: returns (input, target) of a sample by its number; required where views are mixed.
        check_contents: compare contents with the cache. Turn it off where the stream gives samples in another form
            than the teacher's dataset, such as decoded images for a cache of files.

    Raises:
        UsageError: a cache without a sample table, an invalid option, or views that are mixed without `partner`.
        IdentityMismatch: `plan` is not the cache's, or, while iterating, a view differs from what the teacher saw.
        SampleMismatch: while iterating: a sample that the cache lacks, a repeated one, or another content.
    """

    def __init__(
        self,
        stream: Iterable[Any],
        cache: LogitCache,
        *,
        plan: ViewPlan | None = None,
        preprocess: Callable[[Any], Any] | None = None,
        cycle: Sequence[int] | None = None,
        fields: Fields | None = None,
        decode: Callable[[bytes], Any] | None = None,
        missing: Literal["error", "skip"] = "error",
        repeated: Literal["keep", "skip", "error"] = "keep",
        partner: Load | None = None,
        check_contents: bool = True,
    ) -> None:
        _check_choice("missing", missing, ("error", "skip"))
        _check_choice("repeated", repeated, ("keep", "skip", "error"))
        samples = cache.samples
        if samples is None:
            raise UsageError(
                f"{cache.storage.url} has no table of samples, so a stream can't be joined to it by key; build it with "
                "`create(samples=logitcache.sample_table(dataset, contents=True))`, or with a pipeline"
            )
        if plan is None:
            plan = cache.view_plan
        else:
            cache.check_plan(plan)
        if plan.mixes_samples and partner is None:
            raise no_partner()
        self.stream = stream
        self.plan = replace(plan, num_samples=cache.num_samples, rows=cache.row_map, views=cache.views, contents=None)
        self.cycle = list(cache.views if cycle is None else cycle)
        for view in self.cycle:
            self.plan.check_view(view)
        if not self.cycle:
            raise UsageError("`cycle` is empty; expected at least one view")
        self.numbers = KeyNumbers(samples)
        """Sample numbers by key."""
        self._renderer = Renderer(self.plan, preprocess)
        self._fields = fields
        self._decode = decode
        self._missing = missing
        self._repeated = repeated
        self._partner = partner
        self._contents = samples.contents if check_contents else None
        self._targets = samples.targets
        # Of the teacher's inputs, which a student's preprocessing doesn't change.
        self._teacher = Renderer(self.plan)
        self._proofs = {view: cache.input_digests(view) for view in self.cycle}
        self._manifest = cache.manifest
        self._tally = _Tally(samples.num_samples)
        self._kept = Path(tempfile.mkdtemp(prefix="logitcache-stream-"))
        self._at_hand: dict[int, tuple[Any, Any]] = {}
        weakref.finalize(self, _remove, self._kept, os.getpid())
        self._tally.start(self.cycle[0])
        plan.datasets.add(self)

    def set_view(self, view: int) -> int:
        """Choose the view, start to count anew, and return the view's number.

        Running workers follow, with the next samples that they render. Batches that they have made keep their view.

        Raises:
            UsageError: the cache does not have this view.
        """
        self._tally.start(self.plan.check_view(view))
        return view

    def set_epoch(self, epoch: int) -> int:
        """Choose view `cycle[epoch % len(cycle)]` as `set_view` does; also calls the stream's own `set_epoch`."""
        if hasattr(self.stream, "set_epoch"):
            self.stream.set_epoch(epoch)
        return self.set_view(self.cycle[epoch % len(self.cycle)])

    def collate(self, samples: Sequence[tuple[int, Any, Any]]) -> Batch:
        """Build a batch with the plan's `collate`, for `DataLoader(collate_fn=views.collate)`."""
        return collate(samples, self.plan.collate)

    def __iter__(self) -> Iterator[tuple[int, Any, Any]]:
        end_with_parent()
        worker = get_worker_info()
        count = self._tally.of_worker(None if worker is None else worker.id)
        items = iter(self.stream)
        while chunk := list(islice(items, CHUNK)):
            view = count.follow()
            with preserved_generators():
                rendered = [self._render(view, item, count) for item in chunk]
            yield from (item for item in rendered if item is not None)
        count.finish()

    def _render(self, view: int, item: Any, count: _Count) -> tuple[int, Any, Any] | None:
        found, value, target = stream_item(item, self._fields)
        key = str(found)
        number = self.numbers.find(key)
        if number < 0:
            count.miss(key)
            if self._missing == "skip":
                return None
            raise SampleMismatch(
                f"sample {key!r} of the stream is not in the cache, which has {self.numbers.num_samples} samples.\n"
                "Build a cache of this data; or pass missing='skip' to leave out the samples that it lacks."
            )
        again = count.see(number)
        if again and self._repeated == "error":
            raise SampleMismatch(
                f"sample {key!r} comes a second time.\nRemove it from the stream, and make sure that each DataLoader "
                "worker and rank reads its own part; or pass repeated='keep', and call `set_epoch` before each epoch."
            )
        # Of a repeated key too: another sample may have it.
        value = self._loaded(value, number, key, check=again or not count.checked[number])
        count.checked[number] = True
        if again and self._repeated == "skip":
            count.leave_out()
            return None
        sample = value, self._targets[number].item() if target is None else target
        place = count.give()
        if place is not None:
            self._keep(f"{count.slot}-{place}", number, sample)
        rendered = self._renderer.item(view, number, sample, self._partner, self.numbers.key)
        if number in self._proofs.get(view, {}):
            self._prove(view, number, sample, rendered[1])
        return rendered

    def _loaded(self, value: Any, number: int, key: str, *, check: bool) -> Any:
        """The decoded sample; with `check` its content is compared with the cache."""
        content = None
        if self._decode is not None:
            content = file_bytes(value, key)
            try:
                value = self._decode(content)
            except Exception as error:
                raise SampleMismatch(f"sample {key!r} can't be decoded: {type(error).__name__}: {error}") from error
        if self._contents is None or not check:
            return value
        expected = self._contents[number].tobytes()
        if not any(same_content(expected, digest) for digest in _digests(value, content)):
            raise SampleMismatch(
                f"sample {number} ({key}) is not what the teacher saw: its content has the digest "
                f"{next(_digests(value, content)).hex()} here, "
                f"{expected.hex()} in the cache.\nRestore the sample, or build a new cache from this data. If the "
                "cache was made from files and the stream gives decoded samples, let it give the bytes, and pass "
                "`decode`; or pass check_contents=False."
            )
        return value

    def _prove(self, view: int, number: int, sample: tuple[Any, Any], rendered: Any) -> None:
        """Compare a sample's view with the stored digest of the teacher's input."""
        if self._renderer.preprocess is not self.plan.preprocess:
            rendered = self._teacher.item(view, number, sample, self._partner, self.numbers.key)[1]
        found, expected = input_digest(rendered).hex(), self._proofs[view][number]
        if found != expected:
            raise input_mismatch(
                view,
                number,
                self.numbers.key(number),
                found,
                expected,
                self._manifest,
                knows_samples=self._contents is not None,
            )

    def _keep(self, name: str, number: int, sample: tuple[Any, Any]) -> None:
        """Keep a sample for `cache.check_batch`, which renders it again."""
        unfinished, kept = self._kept / f"{name}.new", self._kept / name
        unfinished.write_bytes(pickle.dumps((number, sample)))
        kept.unlink(missing_ok=True)  # ext4 waits for the disk when a file is renamed to an existing one
        unfinished.rename(kept)

    def _kept_samples(self) -> dict[int, tuple[Any, Any]]:
        # Written by workers of this process, in a folder that no other user can write to: never data from elsewhere.
        # DataLoader's pipes carry the same samples in the same form.
        samples: dict[int, tuple[Any, Any]] = {}
        for path in self._kept.iterdir():
            if not path.suffix:
                with suppress(FileNotFoundError):  # a worker replaces it at this moment
                    number, sample = pickle.loads(path.read_bytes())
                    samples[number] = sample
        return samples

    def at_hand(self, numbers: Sequence[int]) -> list[int]:
        """The places of those samples, of some of a batch, that `batch` can render: a few that arrived lately."""
        # Read once for the calls that follow: running workers replace samples at any moment.
        self._at_hand = self._kept_samples()
        return [place for place, number in enumerate(numbers) if number in self._at_hand]

    def index_of(self, row: int) -> int | None:
        """The number of a sample if `at_hand` has found it, else None."""
        return row if row in self._at_hand else None

    def batch(self, items: Iterable[tuple[int, int]]) -> Any:
        """The batched inputs of some (view, sample number) that `at_hand` has found, rendered again."""
        with preserved_generators():
            rendered = [
                self._renderer.item(view, number, self._at_hand[number], self._partner, self.numbers.key)
                for view, number in items
            ]
        return self.collate(rendered)[1]

    def verified(self, view: int) -> int:
        """Proof samples of the current view that have arrived and agree with the teacher's inputs."""
        seen = self._tally.seen()
        return sum(bool(seen[number]) for number in self._proofs.get(view, {})) if view == self._tally.view else 0

    def summary(self, *, all_ranks: bool = False) -> StreamSummary:
        """Counts of the samples since `set_epoch` or `set_view` was last called, of all workers of this process.

        Args:
            all_ranks: add up those of all DDP ranks; each rank must call it. A sample that two ranks read is repeated.
        """
        counts = self._tally.read()
        totals, seen, again, keys = _of_all_ranks(*counts) if all_ranks else counts
        rendered, left_out, missing, open_passes = totals.tolist()
        repeated = torch.nonzero((again > 0) | (seen > 1)).flatten().tolist()
        absent = torch.nonzero(seen == 0).flatten().tolist()
        return StreamSummary(
            view=self._tally.view,
            rendered=rendered,
            not_in_cache=missing,
            not_in_cache_keys=tuple(keys[:SHOWN_KEYS]),
            repeated=rendered + left_out - int((seen > 0).sum()),
            repeated_keys=tuple(map(self.numbers.key, repeated[:SHOWN_KEYS])),
            not_in_stream=len(absent),
            not_in_stream_keys=tuple(map(self.numbers.key, absent[:SHOWN_KEYS])),
            finished=not open_passes and rendered + missing > 0,
        )


@dataclass(frozen=True, kw_only=True)
class StreamSummary:
    """What a stream gave since `set_epoch` or `set_view` was last called."""

    view: int
    rendered: int
    """Items that were given."""
    not_in_cache: int
    """Samples of the stream that the cache lacks."""
    not_in_cache_keys: tuple[str, ...]
    """The first few, of each worker."""
    repeated: int
    """Items whose sample was given before."""
    repeated_keys: tuple[str, ...]
    """The first few, in the order of the cache."""
    not_in_stream: int
    """Samples of the cache that have not been given."""
    not_in_stream_keys: tuple[str, ...]
    """The first few, in the order of the cache."""
    finished: bool
    """Whether every worker that started has come to the end of the stream."""

    def check(self) -> None:
        """Refuse a stream that is not exactly the cache's samples, each once.

        Raises:
            SampleMismatch: names the samples that are missing, unknown or repeated; or the stream is not at its end.
        """
        if not self.finished:
            raise SampleMismatch("the stream is not at its end; call this after the last batch")
        if self.not_in_cache or self.repeated or self.not_in_stream:
            raise SampleMismatch(f"the stream's samples are not those of the cache, each once: {self}")

    def __str__(self) -> str:
        counts = (
            (self.not_in_cache, "not in the cache", self.not_in_cache_keys),
            (self.repeated, "repeated", self.repeated_keys),
            (self.not_in_stream, "of the cache not seen" + ("" if self.finished else " yet"), self.not_in_stream_keys),
        )
        parts = [f"view {self.view}: {self.rendered} samples"]
        parts += [
            f"{count} {what} ({', '.join(keys)}{', …' if count > len(keys) else ''})"
            for count, what, keys in counts
            if count
        ]
        return "; ".join(parts)


class KeyNumbers:
    """Sample numbers by key, in arrays that DataLoader workers share after a fork.

    Args:
        samples: of a cache. Without keys, a sample's key is its position.
    """

    def __init__(self, samples: SampleTable) -> None:
        self.num_samples = samples.num_samples
        self.key = samples.key
        self._keys = samples.keys
        if samples.keys is not None:
            hashes = np.fromiter(map(_key_hash, samples.keys), dtype=np.uint64, count=samples.num_samples)
            self._order = np.argsort(hashes, kind="stable")
            self._hashes = hashes[self._order]

    def find(self, key: str) -> int:
        """The number of a sample; -1 for an unknown key."""
        if self._keys is None:
            return int(key) if key.isdecimal() and str(int(key)) == key and int(key) < self.num_samples else -1
        wanted = np.uint64(_key_hash(key))
        place = int(np.searchsorted(self._hashes, wanted))
        while place < self.num_samples and self._hashes[place] == wanted:
            number = int(self._order[place])
            if self._keys[number] == key:
                return number
            place += 1
        return -1


def _digests(value: Any, content: bytes | None) -> Iterator[bytes]:
    """The digests that the teacher's dataset may have taken of a sample: of its bytes, its token ids, or its input."""
    if content is not None:
        yield bytes_digest(content)
    elif isinstance(value, Mapping) and INPUT_IDS in value:
        yield bytes_digest(content_of_ids(np.asarray(value[INPUT_IDS])))
    yield input_digest(value)


def _key_hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(errors="surrogatepass"), digest_size=8).digest(), "little")


class _Tally:
    """Counts of all workers of a process, in shared memory. Each worker writes its own row, so none needs a lock.

    Counting starts anew with each *round*, which the main process starts.
    """

    def __init__(self, num_samples: int) -> None:
        self._round_and_view = _shared(torch.zeros(2, dtype=torch.int64))
        self._rows = _shared(torch.zeros((MAX_WORKERS + 1, 5), dtype=torch.int64))
        self._names = _shared(torch.zeros((MAX_WORKERS + 1, NAME_BYTES), dtype=torch.uint8))
        self._seen = _shared(torch.zeros(num_samples, dtype=torch.int32))
        """Twice the round in which a sample was seen last, plus 1 if it was seen again."""
        self._checked = _shared(torch.zeros(num_samples, dtype=torch.bool))
        """Whether a sample's content was found to be the cache's, in any round."""

    @property
    def view(self) -> int:
        """The view of this round."""
        return int(self._round_and_view[1])

    def start(self, view: int) -> None:
        """Start a round."""
        self._round_and_view[1] = view
        self._round_and_view[0] += 1

    def of_worker(self, worker: int | None) -> _Count:
        """The counter of one pass of a worker, or of the main process."""
        slot = 0 if worker is None else worker + 1
        if slot > MAX_WORKERS:
            raise UsageError(f"a stream of views takes at most {MAX_WORKERS} DataLoader workers")
        arrays = self._round_and_view, self._rows[slot], self._names[slot], self._seen, self._checked
        return _Count(slot, *(tensor.numpy() for tensor in arrays))

    def seen(self) -> Tensor:
        """Whether each sample was seen in this round, int64 (N,)."""
        return (self._seen >> 1 == self._round_and_view[0]).long()

    def read(self) -> tuple[Tensor, Tensor, Tensor, list[str]]:
        """(rendered, left out, missing, open passes); `seen`; which samples were seen again; keys that are missing."""
        number = self._round_and_view[0]
        ours = self._rows[:, 0] == number
        keys: list[str] = []
        for line in self._names[ours].numpy():
            keys += json.loads(line.tobytes().rstrip(b"\0") or b"[]")
        return self._rows[ours, 1:].sum(dim=0), self.seen(), (self._seen == 2 * number + 1).long(), keys


class _Count:
    """Counts one pass of a worker over the stream."""

    def __init__(
        self,
        slot: int,
        round_and_view: np.ndarray,
        row: np.ndarray,
        names: np.ndarray,
        seen: np.ndarray,
        checked: np.ndarray,
    ) -> None:
        self.slot = slot
        self.checked = checked
        self._round_and_view, self._row, self._names, self._seen = round_and_view, row, names, seen
        self._round = -1
        self._given = 0
        self._named: list[str] = []
        self._is_open = 0
        self.follow()
        self._is_open = 1
        row[4] += 1

    def follow(self) -> int:
        """Take over the round of the main process; returns its view."""
        number, view = self._round_and_view.tolist()
        if number != self._row[0]:
            self._row[:] = number, 0, 0, 0, self._is_open
            self._names[:] = 0
        if number != self._round:
            self._round, self._given, self._named = number, 0, []
        return int(view)

    def give(self) -> int | None:
        """Count an item; returns the place where it is kept for checks, for items 0, 1, 2, 4, 8, … of a round."""
        self._row[1] += 1
        given, self._given = self._given, self._given + 1
        return None if given & (given - 1) else given.bit_length()

    def leave_out(self) -> None:
        """Count a repeated item that is left out."""
        self._row[2] += 1

    def miss(self, key: str) -> None:
        """Count a key that the cache lacks, the first few by name."""
        self._row[3] += 1
        named = json.dumps([*self._named, key]).encode()
        if len(self._named) < SHOWN_KEYS and len(named) < NAME_BYTES:
            self._named.append(key)
            self._names[: len(named)] = np.frombuffer(named, dtype=np.uint8)

    def finish(self) -> None:
        """The stream is at its end."""
        self.follow()
        self._row[4] -= 1

    def see(self, number: int) -> bool:
        """Note a sample; returns whether it was seen in this round before."""
        again = bool(self._seen[number] >> 1 == self._round)
        self._seen[number] = 2 * self._round + again
        return again


def _of_all_ranks(
    totals: Tensor, seen: Tensor, again: Tensor, keys: list[str]
) -> tuple[Tensor, Tensor, Tensor, list[str]]:
    """The sums over all ranks of the process group."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return totals, seen, again, keys
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    sums = [part.to(device) for part in (totals, seen, again)]
    for part in sums:
        torch.distributed.all_reduce(part)
    lists: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(lists, keys)
    totals, seen, again = (part.cpu() for part in sums)
    return totals, seen, again, [key for each in lists for key in each]


def _shared(tensor: Tensor) -> Tensor:
    """A tensor in memory that DataLoader workers share."""
    return tensor.share_memory_()  # type: ignore[no-untyped-call,no-any-return]


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UsageError(f"{name} is {value!r}; expected one of {', '.join(map(repr, choices))}")


def _remove(folder: Path, process: int) -> None:
    """Remove the kept samples, in the process that made the folder; a forked worker must not."""
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)
