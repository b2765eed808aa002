"""What claims promise on every kind of store."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import logitcache
from logitcache.cache.summary import summarise
from logitcache.engines.claims import _from_own_place
from logitcache.errors import UsageError
from logitcache.share.transfer import push
from logitcache.storage import LocalStorage, Storage, open_storage
from logitcache.storage.claims import Claims
from logitcache.verify.audit import verify
from tests.contract.test_sealing import written

On = Callable[[str], str]
SECONDS = 60.0


class Clock:
    """A worker's own clock, which only the test moves."""

    def __init__(self, start: float = 0.0) -> None:
        self.now = start

    def __call__(self) -> float:
        return self.now


@pytest.fixture(params=["folder", "memory", "moto"])
def storage(request: pytest.FixtureRequest, on: On, tmp_path: Path) -> Storage:
    return open_storage(tmp_path / "a.cache" if request.param == "folder" else on(request.param))


def test_a_claim_is_held_by_one_worker_until_it_is_released(storage: Storage) -> None:
    first, second = Claims(storage), Claims(storage)

    assert (True, False) == (first.take("v00000/b00001"), second.take("v00000/b00001"))
    assert second.take("v00000/b00002"), "another name is free"
    first.release("v00000/b00001")
    assert second.take("v00000/b00001")
    second.release("v00000/b00001")
    second.release("v00000/b00002")
    assert [] == list(storage.list_keys())


def test_a_claim_that_is_not_renewed_expires_by_the_clock_of_the_one_that_looks(storage: Storage) -> None:
    """The clocks of the two differ by a year: only differences on one clock count."""
    clock = Clock(start=-3e7)
    dead, alive = Claims(storage, seconds=SECONDS), Claims(storage, seconds=SECONDS, clock=clock)
    dead.take("block")
    assert not alive.take("block")
    clock.now += SECONDS - 1
    assert not alive.take("block")
    clock.now += 1
    assert alive.take("block")

    alive.release("block")
    assert [] == list(storage.list_keys()), "the expired claim is removed with the one that replaced it"


def test_a_renewed_claim_does_not_expire(storage: Storage) -> None:
    clock = Clock()
    slow, other = Claims(storage, seconds=SECONDS), Claims(storage, seconds=SECONDS, clock=clock)
    slow.take("block")
    for _ in range(4):
        assert not other.take("block")
        clock.now += SECONDS
        slow.renew()
    assert not other.take("block")


def test_a_claim_lasts_as_long_as_its_owner_states(storage: Storage) -> None:
    clock = Clock()
    patient, hasty = Claims(storage, seconds=10 * SECONDS), Claims(storage, seconds=SECONDS, clock=clock)
    patient.take("block")
    assert not hasty.take("block")
    clock.now += 9 * SECONDS
    assert not hasty.take("block")
    clock.now += SECONDS
    assert hasty.take("block")


def test_a_late_owner_changes_nothing_for_the_one_that_took_over(storage: Storage) -> None:
    clock = Clock()
    late, taker, third = (Claims(storage, seconds=SECONDS, clock=clock) for _ in range(3))
    late.take("block")
    assert [False, False] == [taker.take("block"), third.take("block")]
    clock.now += SECONDS
    assert taker.take("block")
    late.renew()
    assert frozenset() == late.held
    late.release("block")
    assert not third.take("block"), "the first claim expired, the second did not"
    taker.renew()
    assert {"block"} == taker.held


def test_a_release_by_an_owner_that_does_not_know_of_the_takeover_leaves_it_alone(storage: Storage) -> None:
    clock = Clock()
    late, taker = (Claims(storage, seconds=SECONDS, clock=clock) for _ in range(2))
    late.take("block")
    taker.take("block")
    clock.now += SECONDS
    assert taker.take("block")
    late.release("block")

    assert not Claims(storage).take("block")


@pytest.mark.parametrize("expired", [False, True], ids=["a new claim", "an expired claim"])
def test_of_many_takers_at_once_one_succeeds(storage: Storage, expired: bool) -> None:
    clock = Clock()
    if expired:
        Claims(storage, seconds=SECONDS).take("block")
    takers = [Claims(storage, seconds=SECONDS, clock=clock) for _ in range(6)]
    if expired:
        assert not any(taker.take("block") for taker in takers)
        clock.now += SECONDS
    start, taken = threading.Barrier(len(takers)), []

    def take(taker: Claims) -> None:
        start.wait()
        taken.append(taker.take("block"))

    threads = [threading.Thread(target=take, args=(taker,)) for taker in takers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert [True] == [each for each in taken if each]


def test_a_worker_renews_by_itself_and_releases_at_its_end(tmp_path: Path) -> None:
    storage, renewed = open_storage(tmp_path), threading.Event()

    class Watched(Claims):
        def renew(self) -> None:
            super().renew()
            renewed.set()

    with Watched(storage, seconds=0.2) as claims:
        claims.take("block")
        before = storage.get("claims/block.00001.json")
        assert renewed.wait(30)
        after = storage.get("claims/block.00001.json")
    assert None not in (before, after)
    assert before != after
    assert [] == list(storage.list_keys())


def test_damaged_claims_expire_too(tmp_path: Path) -> None:
    clock, storage = Clock(), open_storage(tmp_path)
    for content in (b"", b"[]", b'{"seconds": "soon"}', b'{"seconds": 1e300}', b"\xff" * 9000):
        storage.put("claims/block.00001.json", content)
        claims = Claims(storage, seconds=SECONDS, clock=clock)
        assert not claims.take("block")
        clock.now += 86_400
        assert claims.take("block")
        claims.release("block")


def test_claims_need_a_time_after_which_they_expire(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expire after 0 seconds; expected more than 0"):
        Claims(open_storage(tmp_path), seconds=0)


def test_workers_start_at_different_places() -> None:
    blocks = [logitcache.Block(0, number) for number in range(1000)]
    orders = [_from_own_place(blocks, owner, 1) for owner in ("gpu-1", "gpu-2", "gpu-3")]

    assert 3 == len({order[0] for order in orders})
    assert all(blocks == sorted(order) for order in orders)


def test_workers_start_with_the_first_block_of_the_same_samples() -> None:
    blocks = [logitcache.Block(view, number) for number in range(1000) for view in range(4)]
    orders = [_from_own_place(blocks, owner, 4) for owner in ("gpu-1", "gpu-2", "gpu-3")]

    assert [0, 0, 0] == [order[0].view for order in orders]
    assert 3 == len({order[0] for order in orders})


def test_a_claim_that_a_dead_worker_left_is_no_part_of_the_cache(tmp_path: Path) -> None:
    path = tmp_path / "a.cache"
    digest = logitcache.seal(written(path)).digest
    before = summarise(str(path))
    Claims(LocalStorage(path)).take("v00000/b00000")

    assert [] == verify(str(path), deep=True)
    assert before == summarise(str(path))
    push(str(path), str(tmp_path / "b.cache"))
    assert not (tmp_path / "b.cache/claims").exists()
    assert digest == logitcache.open(path).digest


def test_sealing_removes_the_claims_of_dead_workers(tmp_path: Path) -> None:
    path = tmp_path / "a.cache"
    Claims(LocalStorage(path)).take("v00000/b00000")  # before the cache is there
    logitcache.seal(written(path))

    assert [] == list(LocalStorage(path).list_keys("claims"))
