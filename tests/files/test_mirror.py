"""A folder kept equal to one in a bucket: at every moment the store has what its seals promise."""

import contextlib
import hashlib
import itertools
import threading

import pytest

from spinejax.errors import SpinejaxError
from spinejax.files import checksums, lease, stores
from spinejax.files.mirror import held, mirror_of
from spinejax.files.stores import Address, StoreError
from tests.object_store import bucket, cut_short, forbidden, slow, sometimes, store, unavailable, vanishes

__all__ = ["bucket", "store"]

REPLACES = ("steps/*", "export/*")


@pytest.fixture(autouse=True)
def no_waits(monkeypatch):
    monkeypatch.setattr(stores, "WAITS_SECONDS", (0, 0, 0))
    monkeypatch.setattr(lease, "LEASE_SECONDS", 1)  # what a store that is away keeps is this process's own


@pytest.fixture
def address(bucket):
    return Address("s3", f"{bucket}/runs/one")


def write_step(folder, name, content):
    """A sealed folder of two files."""
    temporary = folder / f"{name}-new.tmp"
    (temporary / "arrays").mkdir(parents=True)
    (temporary / "arrays" / "a").write_text(content)
    (temporary / "arrays" / "b").write_bytes(content.encode() * 1000)
    checksums.seal(temporary)
    checksums.discard(folder / name)
    checksums.commit(temporary, folder / name)


def contents(store, address):
    bucket, _, folder = address.path.partition("/")
    client = store.client()
    names = [name for name in store.names(bucket, f"{folder}/") if "/.leases/" not in name]
    return {name[len(folder) + 1 :]: client.get_object(Bucket=bucket, Key=name)["Body"].read() for name in names}


def sealed(found):
    """The sealed folders. Raises AssertionError if one has not exactly what its seal lists."""
    folders = {name.removesuffix(f"/{checksums.SUMS}") for name in found if name.endswith(f"/{checksums.SUMS}")}
    for folder in folders:
        listed = dict(reversed(line.split("  ")) for line in found[f"{folder}/{checksums.SUMS}"].decode().splitlines())
        inside = {
            name.removeprefix(f"{folder}/"): text for name, text in found.items() if name.startswith(f"{folder}/")
        }
        inside.pop(checksums.SUMS)
        assert {name: hashlib.sha256(text).hexdigest() for name, text in inside.items()} == listed
    return folders


def here(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def two_saves(one):
    """What a run does between two pushes: another step, the oldest one deleted, the export replaced, the log longer."""
    write_step(one.folder, "steps/3", "third")
    checksums.discard(one.folder / "steps" / "1")
    write_step(one.folder, "export", "new")
    (one.folder / "log").write_text("one\ntwo\n")


def after_a_push(address, cache):
    """A mirror with two steps, after its first push."""
    one = mirror_of(address, cache, "work", replaces=REPLACES)
    for number, content in ((1, "first"), (2, "second")):
        write_step(one.folder, f"steps/{number}", content)
    write_step(one.folder, "export", "old")
    (one.folder / "log").write_text("one\n")
    (one.folder / "half.tmp").write_text("not yet")
    one.push()
    return one


@pytest.fixture
def pushed(store, address, tmp_path):
    return after_a_push(address, tmp_path / "cache")


def test_a_push_makes_both_folders_equal_and_sends_only_what_changed(store, address, pushed):
    assert contents(store, address) == {name: text for name, text in here(pushed.folder).items() if name != "half.tmp"}
    two_saves(pushed)
    store.client().put_object(Bucket=address.path.split("/")[0], Key="runs/one/notes", Body=b"the user's own")
    store.requests.clear()
    pushed.push()
    found = contents(store, address)
    assert found.pop("notes") == b"the user's own"
    assert found == {name: text for name, text in here(pushed.folder).items() if name != "half.tmp"}
    written = {path.split("one/")[1] for method, path in store.requests if method == "PUT"}
    assert not any(name.startswith("steps/2/") for name in written)


def only(number):
    """A store that takes so many changes and no more."""
    left, lock = number, threading.Lock()

    def fault(environ, answer):
        nonlocal left
        if environ["REQUEST_METHOD"] in ("PUT", "DELETE", "POST"):
            with lock:
                left -= 1
                refused = left < 0
            if refused:
                return forbidden(environ, answer)
        return answer()

    return fault


def interrupted(store, bucket, folder, prepare=lambda address: None):
    """Pushes of two saves: one of no change, one that is interrupted after a change, and so on, until one is whole."""
    for number in itertools.count():
        address = Address("s3", f"{bucket}/{number}")
        one = after_a_push(address, folder / str(number))
        prepare(address)
        two_saves(one)
        whole = False
        with store.faulty(only(number)), contextlib.suppress(StoreError):
            one.push()
            whole = True
        yield address, one
        if whole:
            return


def test_wherever_it_is_interrupted_every_seal_keeps_its_promise_and_the_next_push_ends_it(store, bucket, tmp_path):
    count = -1  # of changes: the first push makes none
    for address, one in interrupted(store, bucket, tmp_path):
        count += 1
        found = sealed(contents(store, address))
        assert "steps/2" in found
        assert found & {"steps/1", "steps/3"}
        one.push()
        assert sealed(contents(store, address)) == {"steps/2", "steps/3", "export"}
    assert count == 13  # a seal, two files of the size that they had, five files, two seals, a seal, two files


def test_what_a_killed_writer_left_of_a_step_is_gone_before_the_step_is_sealed(store, bucket, tmp_path):
    """The same step, made again, has files of other names."""

    def half_written(address):
        (address / "steps/3/arrays/of-the-killed").write_bytes(b"half")

    count = -1
    for address, _one in interrupted(store, bucket, tmp_path, half_written):
        count += 1
        found = sealed(contents(store, address))
    assert "steps/3" in found
    assert count == 14  # the changes of the test above, and one file


def test_a_late_write_of_a_killed_writer_is_not_pulled_and_the_next_push_deletes_it(store, address, pushed, tmp_path):
    late = address / "steps/2/arrays/late"
    late.write_bytes(b"too late")
    other, said = mirror_of(address, tmp_path / "other", "work", replaces=REPLACES), []
    assert "steps/2/arrays/late" not in work(other, said, "3")
    assert not late.is_file()
    assert sealed(contents(store, address)) == {"steps/1", "steps/2", "steps/3", "export"}


@pytest.mark.parametrize(
    "fault",
    [slow, sometimes(unavailable), sometimes(cut_short, methods=("GET",)), sometimes(vanishes, 3, methods=("PUT",))],
    ids=["slow", "503", "cut short", "writes that vanish"],
)
def test_a_network_with_faults_ends_with_equal_folders(store, address, pushed, tmp_path, fault):
    two_saves(pushed)
    with store.faulty(fault):
        pushed.push()
        again = mirror_of(address, tmp_path / "other", "work")
        again.pull(lambda name: True)
    assert here(again.folder) == {name: text for name, text in here(pushed.folder).items() if name != "half.tmp"}


def test_a_write_that_vanishes_is_noticed_also_where_the_file_has_the_size_of_the_old_one(
    store, address, pushed, tmp_path
):
    two_saves(pushed)
    lost = []

    def fault(environ, answer):
        name = environ["PATH_INFO"].partition("/export/")[2]
        if environ["REQUEST_METHOD"] == "PUT" and name.startswith("arrays/") and name not in lost:
            lost.append(name)
            return vanishes(environ, answer)
        return answer()

    with store.faulty(fault):
        pushed.push()
    assert sorted(lost) == ["arrays/a", "arrays/b"]
    assert contents(store, address)["export/arrays/b"] == b"new" * 1000


def test_a_store_that_confirms_and_has_nothing_is_told_apart_from_one_that_has_it(store, address, pushed):
    two_saves(pushed)
    fault = sometimes(vanishes, 1, methods=("PUT",))
    with store.faulty(fault), pytest.raises(StoreError, match="confirmed that it was written, and does not have it"):
        pushed.push()
    assert "steps/2" in sealed(contents(store, address))


def test_a_pull_takes_no_step_without_its_seal_and_no_file_that_is_not_what_was_written(
    store, address, pushed, tmp_path
):
    client, bucket = store.client(), address.path.split("/")[0]
    client.delete_object(Bucket=bucket, Key=f"runs/one/steps/1/{checksums.SUMS}")
    one = mirror_of(address, tmp_path / "other", "work")
    one.pull(lambda name: name.startswith("steps/"))
    assert {name.split("/")[1] for name in here(one.folder)} == {"2"}
    client.put_object(Bucket=bucket, Key="runs/one/steps/2/arrays/a", Body=b"secund")
    with pytest.raises(SpinejaxError, match="steps/2/arrays/a: its sha256 is not the one that is listed"):
        mirror_of(address, tmp_path / "third", "work").pull(lambda name: True)


def work(one, said, step, content="", *, then=lambda: None):
    """Hold the folder, and write a step. Returns what was in it before."""
    with held(one, wanted=lambda name: True, advice="", tell=said.append):
        found = here(one.folder)
        write_step(one.folder, f"steps/{step}", content or step)
        then()
        return found


def is_killed():
    raise KeyboardInterrupt


def test_what_could_not_be_copied_is_kept_and_the_next_start_copies_it(store, address, tmp_path):
    one, said = mirror_of(address, tmp_path / "cache", "work", replaces=REPLACES), []
    work(one, said, "1")
    assert not one.folder.exists()
    with pytest.raises(SpinejaxError, match=f"Everything is saved in {one.folder}: start the same command again"):
        work(one, said, "2", then=lambda: setattr(store, "fault", forbidden))
    store.fault = None
    assert sealed(contents(store, address)) == {"steps/1"}
    assert {name.split("/")[1] for name in work(one, said, "3")} == {"1", "2"}
    assert sealed(contents(store, address)) == {"steps/1", "steps/2", "steps/3"}
    assert not [line for line in said if line.startswith("note")]


def test_a_machine_that_others_have_overtaken_starts_from_the_store_and_keeps_its_own_work(store, address, tmp_path):
    ours, said = mirror_of(address, tmp_path / "ours", "work", replaces=REPLACES), []
    theirs = mirror_of(address, tmp_path / "theirs", "work", replaces=REPLACES)
    work(ours, said, "1")
    with pytest.raises(KeyboardInterrupt):
        work(ours, said, "2", "ours", then=is_killed)
    work(theirs, said, "2")
    assert said == []
    found = work(ours, said, "3")
    assert found["steps/2/arrays/a"] == b"2"
    kept = tmp_path / "ours" / "work"
    (line,) = said
    assert line.startswith(f"note: {address} has changed since this machine worked on it. That work is in {kept}")
    assert next(kept.glob("*/one.1/steps/2/arrays/a")).read_text() == "ours"


def test_a_run_that_was_deleted_in_the_store_begins_anew(store, address, tmp_path):
    one, said = mirror_of(address, tmp_path / "cache", "work", replaces=REPLACES), []
    with pytest.raises(KeyboardInterrupt):
        work(one, said, "1", then=lambda: one.push() or is_killed())
    client, bucket = store.client(), address.path.split("/")[0]
    for name in store.names(bucket):
        client.delete_object(Bucket=bucket, Key=name)
    assert work(one, said, "2") == {}
    assert said == []


def test_a_pull_that_was_interrupted_is_not_taken_for_the_whole(store, address, tmp_path):
    """Nothing of it is copied back, and nothing in the store is deleted because it is missing here."""
    one, said = mirror_of(address, tmp_path / "cache", "work", replaces=REPLACES), []
    work(one, said, "1")
    whole = contents(store, address)
    bucket = address.path.split("/")[0]

    def no_arrays(environ, answer):
        return forbidden(environ, answer) if "arrays" in environ["PATH_INFO"] else answer()

    with store.faulty(no_arrays), pytest.raises(StoreError, match="no permission"):
        work(one, said, "2")
    assert contents(store, address) == whole
    assert {name for name in work(one, said, "3") if "arrays" in name} == {"steps/1/arrays/a", "steps/1/arrays/b"}
    assert said == []
    assert store.names(bucket, "runs/one/steps/1/")


def test_a_file_that_somebody_deleted_here_is_not_deleted_in_the_store(store, address, pushed):
    (pushed.folder / "steps" / "2" / "arrays" / "a").unlink()
    two_saves(pushed)
    pushed.push()
    assert sealed(contents(store, address)) == {"steps/2", "steps/3", "export"}


def test_names_that_lead_out_of_the_folder_are_not_followed(store, address, tmp_path):
    bucket = address.path.split("/")[0]
    for name in ("runs/one//tmp/outside", "runs/one/../../outside", "runs/one/inside"):
        store.client().put_object(Bucket=bucket, Key=name, Body=b"x")
    one = mirror_of(address, tmp_path / "cache", "work")
    one.pull(lambda name: True)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["inside"]


def test_a_page_is_written_last_and_that_of_others_is_left_alone(store, address, tmp_path):
    bucket, folder = address.path.split("/", 1)
    store.client().put_object(Bucket=bucket, Key=f"{folder}/index.html", Body=b"of another option")
    run = mirror_of(address, tmp_path, "work", replaces=REPLACES)
    write_step(run.folder, "steps/1", "first")
    run.push()
    assert contents(store, address)["index.html"] == b"of another option"
    page = mirror_of(address / "page", tmp_path, "work", replaces=("index.html", "discs-*.js"))
    page.folder.mkdir(parents=True)
    for text in ("first", "second"):
        for name in ("index.html", "discs-0001.js"):
            (page.folder / name).write_text(text)
        store.requests.clear()
        page.push()
        changes = [(how, name.split("/")[-1]) for how, name in store.requests if how in ("PUT", "DELETE")]
        assert changes[-1] == ("PUT", "index.html")
        assert (changes[0] == ("DELETE", "index.html")) is (text == "second")
