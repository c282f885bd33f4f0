"""Runs and evaluations in an S3 bucket: the same bits as on a disk, through kills, faults and a second trainer."""

import hashlib
import json
import re
import signal
import time

import flax.traverse_util
import jax
import numpy as np
import pytest

from spinejax.data.manifest import read_manifest
from spinejax.errors import SpinejaxError
from spinejax.files.checksums import SUMS
from spinejax.training import checkpoint, saved_step
from tests.conftest import write_tiny
from tests.object_store import bucket, cut_short, forbidden, sometimes, store, unavailable, vanishes
from tests.running import digests, figures, train_command

__all__ = ["bucket", "store"]

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("store")]  # the store first: the launcher keeps where it is


@pytest.fixture(scope="module")
def straight(launcher, tiny, tmp_path_factory):
    """A run of five epochs on this machine's disk."""
    run = tmp_path_factory.mktemp("straight") / "run"
    end = launcher.run(train_command(tiny, run, "--epochs", 5))
    assert end.status == 0, end
    return run


@pytest.fixture
def there(store, bucket, tiny):
    """The addresses of the tiny data set, and of a run, in a bucket."""
    store.put(tiny, bucket, "discs")
    return f"s3://{bucket}/discs", f"s3://{bucket}/runs/one"


def command(there, cache, *options):
    return train_command(*there, "--cache-dir", cache, *options)


def brought(store, there, folder):
    """A copy of the run in the bucket, made without any of the library's code."""
    bucket = there[1].split("/")[2]
    for key in store.names(bucket, "runs/one/"):
        target = folder / key.removeprefix("runs/one/")
        target.parent.mkdir(parents=True, exist_ok=True)
        store.client().download_file(bucket, key, str(target))
    return folder


def sealed_steps(store, there):
    bucket = there[1].split("/")[2]
    return sorted(int(key.split("/")[3]) for key in store.names(bucket, "runs/one/checkpoints/") if key.endswith(SUMS))


def arrays(folder):
    """Path of each array of a network → its sha256."""
    tree = flax.traverse_util.flatten_dict(saved_step.read(folder, "variables")[1], sep="/")
    return {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in tree.items()}


def is_the_same(run, straight):
    """Two finished runs have the same log, and the same bits in their best and last steps and in what they export."""
    assert figures(run) == figures(straight)
    assert checkpoint.best_step(run) == checkpoint.best_step(straight)
    for step in {checkpoint.best_step(straight), 15}:
        assert digests(run, step) == digests(straight, step)
    assert arrays(run / "export") == arrays(straight / "export")
    assert (run / "curves.png").is_file()


def test_a_run_in_a_bucket_killed_and_resumed_elsewhere_ends_with_the_same_bits(
    store, there, straight, launcher, tmp_path
):
    """Killed three times, each time gone on with by a machine that knows nothing of it but the bucket."""
    for number in range(3):
        before = sealed_steps(store, there)
        trainer = launcher.start(command(there, tmp_path / f"cache{number}", "--epochs", 5))
        trainer.wait_until(lambda before=before: sealed_steps(store, there)[-1:] > before[-1:])
        time.sleep((0, 0.3, 0.05)[number])
        assert trainer.kill().status == -signal.SIGKILL
    end = launcher.run(command(there, tmp_path / "last", "--epochs", 5))
    assert end.status == 0, end
    assert f"{there[1]} is finished: step 15" in end.stdout
    is_the_same(brought(store, there, tmp_path / "run"), straight)
    assert not [*(tmp_path / "last" / "work").glob("*/one")]


def test_a_store_with_faults_gives_the_same_bits(store, there, straight, launcher, tmp_path):
    """Every request takes its time; some fail, break off, or are confirmed and not done."""
    faults = [sometimes(unavailable, 7), sometimes(cut_short, 5, methods=("GET",)), sometimes(vanishes, 9, ("PUT",))]

    def fault(environ, answer):
        def through(rest):
            return rest[0](environ, lambda: through(rest[1:])) if rest else answer()

        time.sleep(0.02)
        return through(faults)

    with store.faulty(fault):
        end = launcher.run(command(there, tmp_path / "cache", "--epochs", 5))
    assert end.status == 0, end
    is_the_same(brought(store, there, tmp_path / "run"), straight)


def test_a_second_trainer_is_refused_and_the_first_goes_on(store, there, launcher, tmp_path):
    first = launcher.start(command(there, tmp_path / "first", "--epochs", 5000, "--plateau-patience", 5000))
    first.wait_until(lambda: sealed_steps(store, there))
    second = launcher.run(command(there, tmp_path / "second", "--epochs", 5000, "--plateau-patience", 5000))
    assert second.status == 2, second
    assert f"error: {there[1]}: another process (host" in second.said[-1]
    assert "is writing there. Choose another --workdir" in second.said[-1]
    seen = sealed_steps(store, there)[-1]
    first.wait_until(lambda: sealed_steps(store, there)[-1] > seen)
    first.send(signal.SIGTERM)
    end = first.end()
    assert end.status == 0, end
    stopped = sealed_steps(store, there)[-1]
    assert f"{there[1]} was stopped by SIGTERM. It is saved at step {stopped}" in end.stdout


def test_a_bucket_that_vanishes_is_told_and_the_run_is_saved_here_and_copied_later(
    store, there, straight, launcher, tmp_path
):
    trainer = launcher.start(command(there, tmp_path / "cache", "--epochs", 5))
    trainer.wait_until(lambda: sealed_steps(store, there))
    with store.faulty(forbidden):
        end = trainer.end()
    assert end.status == 2, end
    (folder,) = (tmp_path / "cache" / "work").glob("*/one")
    assert f"Everything is saved in {folder}: start the same command again to copy it to {there[1]}" in end.said[-1]
    assert "note: s3://" in end.stdout
    assert sealed_steps(store, there)[-1] < 15
    assert checkpoint.Checkpoints(folder, read_only=True).latest_step() == 15
    again = launcher.run(command(there, tmp_path / "cache", "--epochs", 5))
    assert again.status == 0, again
    is_the_same(brought(store, there, tmp_path / "run"), straight)


def test_a_bucket_without_permission_is_refused_before_any_work(store, there, launcher, tmp_path):
    def read_only(environ, answer):
        return answer() if environ["REQUEST_METHOD"] in ("GET", "HEAD") else forbidden(environ, answer)

    with store.faulty(read_only):
        end = launcher.run(command(there, tmp_path / "cache", "--epochs", 5))
    assert end.status == 2, end
    assert len(end.said) == 1
    assert f"{there[1]}/.leases/00000001: no permission" in end.said[0]
    assert sealed_steps(store, there) == []


def test_a_network_in_a_bucket_is_loaded_with_its_optimiser_left_there(store, there, straight, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    bucket = there[1].split("/")[2]
    store.put(straight, bucket, "runs/one")
    store.requests.clear()
    for address in (there[1], f"{there[1]}/export", f"{there[1]}/checkpoints/15"):
        found, expected = (checkpoint.load(folder)[1] for folder in (address, address.replace(there[1], str(straight))))
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert not [path for method, path in store.requests if method == "GET" and "/optimiser/" in path]
    with pytest.raises(SpinejaxError, match=rf"^{re.escape(there[1])}/none: .*not a checkpoint"):
        checkpoint.load(f"{there[1]}/none")


def test_an_evaluation_in_a_bucket_is_the_one_of_a_disk(store, there, straight, tiny, launcher, tmp_path):
    bucket = there[1].split("/")[2]
    store.put(straight, bucket, "runs/one")
    here = launcher.run(
        ["evaluate.py", "--checkpoint", straight, "--data", tiny, "--calibrate", "--out", tmp_path / "here"]
    )
    assert here.status == 0, here
    options = ["--data", there[0], "--calibrate", "--cache-dir", tmp_path / "cache"]
    for checkpoint_address in (there[1], f"{there[1]}/export"):
        out = f"{there[1]}/evaluation-test-1-view"
        also = [] if checkpoint_address == there[1] else ["--out", out]
        end = launcher.run(["evaluate.py", "--checkpoint", checkpoint_address, *options, *also])
        assert end.status == 0, end
        assert f"Results are in {out}" in end.stdout.replace("\n", " ")
        for name in ("predictions.csv", "results.json"):
            body = (
                store.client().get_object(Bucket=bucket, Key=f"runs/one/evaluation-test-1-view/{name}")["Body"].read()
            )
            assert body == (tmp_path / "here" / name).read_bytes()
    assert any(name.endswith("calibration.json") for name in store.names(bucket, "runs/one/checkpoints"))
    assert "runs/one/export/calibration.json" in store.names(bucket, "runs/one/export")
    nothing = launcher.run(["evaluate.py", "--checkpoint", f"s3://{bucket}/none", *options])
    assert nothing.status == 2
    assert re.search(rf"s3://{bucket}/none: .*not a checkpoint", nothing.said[-1])


def test_a_report_and_a_comparison_in_a_bucket_are_those_of_a_disk(store, there, straight, tiny, launcher, tmp_path):
    bucket = there[1].split("/")[2]

    def graded(out, page, *options):
        options = [*options, "--report", page, "--niivue", f"{page}/three-planes"]
        end = launcher.run(["evaluate.py", "--checkpoint", straight, *options, "--out", out])
        assert end.status == 0, end
        assert f"The page is {page}/index.html." in end.stdout
        assert f"NiiVue's page is {page}/three-planes/index.html." in end.stdout

    def content(name):
        return store.client().get_object(Bucket=bucket, Key=name)["Body"].read()

    remote, cache = f"s3://{bucket}", ["--cache-dir", tmp_path / "cache"]
    graded(tmp_path / "one", tmp_path / "page", "--data", tiny)
    graded(tmp_path / "two", tmp_path / "page-two", "--data", tiny, "--tta")
    graded(f"{remote}/one", f"{remote}/page", "--data", there[0], *cache)
    # Results and their page in one folder; and again, into what is there.
    for _ in range(2):
        graded(f"{remote}/two", f"{remote}/two", "--data", there[0], "--tta", *cache)
    for folder, key in (("one", "one"), ("page", "page"), ("two", "two"), ("page-two", "two")):
        for path in (tmp_path / folder).rglob("*.*"):
            name = path.relative_to(tmp_path / folder)
            if path.is_file() and not name.name.startswith(".") and name.suffix != ".png":
                assert content(f"{key}/{name}") == path.read_bytes(), name

    ends = [
        launcher.run(["evaluate.py", "--compare", *pair, "--out", out, *cache])
        for pair, out in (
            ((tmp_path / "one", tmp_path / "two"), tmp_path / "compared"),
            ((f"{remote}/one", f"{remote}/two/predictions.csv"), tmp_path / "reader"),
            ((f"{remote}/one", f"{remote}/two"), f"{remote}/compared"),
        )
    ]
    assert [end.status for end in ends] == [0, 0, 0], ends
    assert f"The page is {remote}/compared/index.html." in ends[2].stdout
    for name in ("comparison.json", "index.html"):
        assert content(f"compared/{name}") == (tmp_path / "compared" / name).read_bytes()
    assert json.loads((tmp_path / "reader" / "comparison.json").read_text())["b"]["name"] == "a reader"
    nothing = launcher.run(["evaluate.py", "--compare", f"{remote}/one", f"{remote}/none", *cache])
    assert nothing.status == 2
    assert f"error: {remote}/none: no predictions.csv in it" in nothing.said[-1]
    scanned = launcher.run(["evaluate.py", "--scan", tiny, "--out", tmp_path / "scan", "--report", f"{remote}/scan"])
    assert scanned.status == 2
    assert f"error: --report {remote}/scan: what --scan cuts out" in scanned.said[-1]


def test_a_run_begins_with_a_network_and_options_in_a_bucket(store, there, straight, tiny, launcher, tmp_path):
    bucket = there[1].split("/")[2]
    store.put(straight, bucket, "runs/first")
    first, cache = f"s3://{bucket}/runs/first", ["--cache-dir", tmp_path / "cache"]
    for name, begin, also in (("here", f"{straight}", []), ("there", first, cache)):
        options = ["--config", f"{begin}/config.json", "--data", tiny, "--workdir", tmp_path / name, "--epochs", 1]
        end = launcher.run(["train.py", *options, "--init-from", f"{begin}/export", *also])
        assert end.status == 0, end
        assert f"From {begin}/export: head_" in end.stdout
    assert digests(tmp_path / "there", 3) == digests(tmp_path / "here", 3)
    assert json.loads((tmp_path / "there" / "config.json").read_text())["init_from"] == f"{first}/export"
    again = launcher.run(["train.py", *options, "--init-from", f"{begin}/export", *also])
    assert again.status == 0, again
    missing = launcher.run(train_command(tiny, tmp_path / "new", "--init-from", f"s3://{bucket}/none", *cache))
    assert missing.status == 2
    assert f"error: s3://{bucket}/none: " in missing.said[-1]
    assert "not a checkpoint" in missing.said[-1]


# Several processes ----------------------------------------------------------------------------------------------------


def of_machines(there, folder, number, *options):
    """The same command for two processes, each on a machine of its own."""
    return [command(there, folder / f"machine{number}-{place}", *options) for place in range(2)]


def test_two_processes_killed_and_resumed_elsewhere_end_with_the_bits_of_two_on_a_disk(
    store, there, tiny, launcher, tmp_path
):
    with launcher.together(*[train_command(tiny, tmp_path / "straight", "--epochs", 5)] * 2) as processes:
        ends = [process.end() for process in processes]
    assert [end.status for end in ends] == [0, 0], ends
    before = sealed_steps(store, there)
    with launcher.together(*of_machines(there, tmp_path, 0, "--epochs", 5)) as processes:
        processes[0].wait_until(lambda: sealed_steps(store, there)[-1:] > before[-1:])
        processes[0].kill()
        assert processes[1].end().status != 0
    with launcher.together(*of_machines(there, tmp_path, "last", "--epochs", 5)) as processes:
        ends = [process.end() for process in processes]
    assert [end.status for end in ends] == [0, 0], ends
    assert f"{there[1]} is finished: step 15" in ends[0].stdout
    assert ends[1].printed == []
    is_the_same(brought(store, there, tmp_path / "run"), tmp_path / "straight")
    # The first process wrote; the second has the discs alone.
    assert [path.name for path in (tmp_path / "machine0-1").iterdir()] == ["shards"]
    assert not [*(tmp_path / "machinelast-0" / "work").glob("*/one")]


def test_processes_wait_for_the_first_ones_last_copy_and_end_alike(store, there, launcher, tmp_path):
    """A store that is slow at the end takes longer than processes wait for each other without a word."""

    def slow_at_the_end(environ, answer):
        if environ["REQUEST_METHOD"] == "PUT" and environ["PATH_INFO"].endswith(("curves.png", "export/SHA256SUMS")):
            time.sleep(12)  # one after the other; after 15 seconds the client would try again
        return answer()

    with (
        store.faulty(slow_at_the_end),
        launcher.together(*[command(there, tmp_path, "--epochs", 1)] * 2) as processes,
    ):
        ends = [process.end() for process in processes]
    assert [end.status for end in ends] == [0, 0], ends
    assert "export/SHA256SUMS" in {name.removeprefix("runs/one/") for name in store.names(there[1].split("/")[2])}

    def last_copy_fails(environ, answer):
        return forbidden(environ, answer) if "curves.png" in environ["PATH_INFO"] else answer()

    again = (there[0], there[1].replace("one", "two"))
    with (
        store.faulty(last_copy_fails),
        launcher.together(*[command(again, tmp_path, "--epochs", 1)] * 2) as processes,
    ):
        ends = [process.end() for process in processes]
    assert [end.status for end in ends] == [2, 2], ends
    assert ends[0].said[-1] == ends[1].said[-1]
    assert "curves.png: no permission" in ends[1].said[-1]
    assert "start the same command again to copy it" in ends[1].said[-1]


def test_all_processes_say_why_a_bucket_is_refused(store, there, launcher, tmp_path):
    def read_only(environ, answer):
        return answer() if environ["REQUEST_METHOD"] in ("GET", "HEAD") else forbidden(environ, answer)

    def refused(fault, *commands):
        with store.faulty(fault), launcher.together(*commands) as processes:
            ends = [process.end() for process in processes]
        assert [end.status for end in ends] == [2, 2], ends
        return [end.said[-1] for end in ends]  # before it, gRPC may miss the process that ended first

    both = [command(there, tmp_path / "cache", "--epochs", 1)] * 2
    for fault, reason in (
        (forbidden, "/discs/manifest.json: no permission"),
        (read_only, "/runs/one/.leases/00000001: no permission"),
    ):
        one, two = refused(fault, *both)
        assert one == two
        assert reason in one
    (tmp_path / "file").touch()
    one, two = refused(None, both[0], command(there, tmp_path / "file", "--epochs", 1))
    assert "error: --cache-dir: " in two
    assert one.startswith(two.replace("error: ", "error: Process 1: "))


def test_each_process_copies_only_the_shards_that_it_reads(store, bucket, straight, launcher, tmp_path):
    """The test split's six discs are one each in the last six of twelve shards; a batch of eight has two of padding."""
    folder = write_tiny(tmp_path / "discs", num_shards=12)
    store.put(folder, bucket, "twelve")
    names = [entry["sha256"] for entry in read_manifest(folder)["files"]]
    options = ["evaluate.py", "--checkpoint", straight, "--data", f"s3://{bucket}/twelve"]
    for also, of_first in (([], names[6:10]), (["--report", tmp_path / "page"], names[6:])):
        caches = [tmp_path / f"{len(also)}-{place}" for place in range(2)]
        commands = [[*options, *also, "--out", f"s3://{bucket}/out", "--cache-dir", cache] for cache in caches]
        with launcher.together(*commands) as processes:
            ends = [process.end() for process in processes]
        assert [end.status for end in ends] == [0, 0], ends
        copied = [{path.stem for path in (cache / "shards").glob("*.h5")} for cache in caches]
        assert copied == [set(of_first), {*names[10:], names[0]}]
        assert ends[1].printed == []
