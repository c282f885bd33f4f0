"""One writer in a folder of a bucket, whatever its holder's end, in stores with and without conditional writes."""

import json
import threading
import time

import pytest

from spinejax.errors import SpinejaxError
from spinejax.files import lease, stores
from spinejax.files.lease import leased
from spinejax.files.stores import Address, StoreError
from tests.object_store import bucket, forbidden, store

__all__ = ["bucket", "store"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(stores, "WAITS_SECONDS", (0, 0))
    for name, seconds in {"RENEW_SECONDS": 0.2, "LEASE_SECONDS": 4, "SETTLE_SECONDS": 1}.items():
        monkeypatch.setattr(lease, name, seconds)


@pytest.fixture
def folder(bucket):
    return Address("s3", f"{bucket}/runs/one")


def without_conditions(environ, answer):
    """A store that overwrites where it should refuse to."""
    environ.pop("HTTP_IF_NONE_MATCH", None)
    return answer()


def with_conditions(environ, answer):
    return answer()


@pytest.mark.parametrize("kind", [with_conditions, without_conditions])
def test_one_of_many_takers_gets_it_and_the_next_after_its_release(store, folder, kind):
    outcomes, over = [], threading.Event()

    def take():
        try:
            with leased(folder, "Go away."):
                outcomes.append("held")
                over.wait(60)
        except SpinejaxError as error:
            outcomes.append(str(error))

    with store.faulty(kind):
        takers = [threading.Thread(target=take) for _ in range(4)]
        for taker in takers:
            taker.start()
        deadline = time.monotonic() + 60
        while len(outcomes) < 4 and time.monotonic() < deadline:
            time.sleep(0.05)
        over.set()
        for taker in takers:
            taker.join()
        assert outcomes.count("held") == 1
        refused = [outcome for outcome in outcomes if outcome != "held"]
        assert all("is writing there. Go away." in outcome for outcome in refused), outcomes
        with leased(folder, ""):
            pass
    names = store.names(folder.path.split("/")[0])
    assert len(names) == 1
    assert (folder / ".leases").files() == {next(iter(names)).rpartition("/")[2]: 2}


def lease_of(store, folder, **content):
    bucket, _, name = folder.path.partition("/")
    body = json.dumps({"holder": "host elsewhere, process 7", "token": "t", **content}).encode()
    store.client().put_object(Bucket=bucket, Key=f"{name}/.leases/00000005", Body=body)


def test_a_lease_that_nobody_renews_is_taken_over(store, folder):
    lease_of(store, folder)
    began = time.monotonic()
    with leased(folder, "") as mine:
        assert time.monotonic() - began >= 4
        mine.check()


def test_a_dead_process_of_this_machine_is_followed_at_once(store, folder, monkeypatch):
    monkeypatch.setattr(lease, "LEASE_SECONDS", 10**6)
    lease_of(store, folder, **lease._here() | {"pid": 2**22 + 1})  # no process has this number
    with leased(folder, ""):
        pass


def test_a_holder_whose_lease_was_taken_over_is_told(store, folder):
    with leased(folder, "") as mine:
        mine.check()
        lease_of(store, folder)
        with pytest.raises(
            SpinejaxError, match=r"s3://.*/one: another process \(host elsewhere, process 7\) has taken"
        ):
            mine.check()


def test_a_bucket_without_permission_or_that_is_not_there_is_named(store, folder):
    with store.faulty(forbidden), pytest.raises(StoreError, match=r"s3://.*: no permission"), leased(folder, ""):
        pass
    gone = Address("s3", "nowhere/run")
    with pytest.raises(StoreError, match=r"nowhere/run/.*cannot be listed \(.*bucket does not"), leased(gone, ""):
        pass
