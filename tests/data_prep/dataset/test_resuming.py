"""Runs that are killed, run out of disk, or meet another run: they go on, to the same bytes."""

import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial

import numpy as np
import pytest

from data_prep.anatomy.discs import DiscVolume
from data_prep.dataset import resuming
from data_prep.dataset import workers as module
from data_prep.dataset.resuming import save_scan
from data_prep.dataset.workers import workers
from data_prep.read.scan import NotSagittalError
from spinejax.data.manifest import MANIFEST
from spinejax.errors import NotInstalledError, SpinejaxError
from spinejax.geometry import VOLUME_SHAPE
from tests.data_prep.dataset.test_build import Cut
from tests.data_prep.dataset.test_build import run as run_jobs

SPLITS = ("train", "validation", "test")


def cut(folder, number):
    """A disc whose brightness is in a file; each call leaves a mark, so that tests see who was cut."""
    (folder / f"cut-{number}-{time.monotonic_ns()}").touch()
    text = (folder / f"scan{number}").read_text()
    if text == "axial":
        raise NotSagittalError(f"scan{number}: an axial series.")
    if text == "black":
        raise SpinejaxError(f"scan{number}: its slices are black.")
    if text == "packed":
        raise NotInstalledError(f"scan{number}: gdcm unpacks it", "scans")
    if (folder / "slow").exists():
        time.sleep(600 if number == 5 else 0.2)  # the last scan is not finished before somebody kills the run
    volume = np.full(VOLUME_SHAPE, int(text), np.uint16)
    return [DiscVolume("L4-L5", volume, np.eye(4), (0, 15))], [f"scan{number}: T9 was left out."] * (number % 2)


def jobs(folder, numbers=range(6)):
    for number in numbers:
        if not (folder / f"scan{number}").exists():
            (folder / f"scan{number}").write_text(f"{number + 1}000")
    return [
        Cut(
            f"scan{n}", f"p{n}", f"s{n}", SPLITS[n % 3], {"L4-L5": {"pfirrmann": n % 5}}, partial(cut, folder, n),
            sources=(folder / f"scan{n}",),
        )
        for n in numbers
    ]  # fmt: skip


def run(folder, out, **options):
    return run_jobs(jobs(folder), out, **({"shards": 3} | options))


def contents(out):
    return {path.name: path.read_bytes() for path in out.iterdir()}


def cuts(folder):
    return sorted(path.name.split("-")[1] for path in folder.glob("cut-*"))


def in_turn(folder):
    return [path.name.split("-")[1] for path in sorted(folder.glob("cut-*"), key=lambda path: int(path.name[6:]))]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "scans").mkdir()
    return tmp_path / "scans"


RUN = "import sys, pathlib as p; from tests.data_prep.dataset.test_resuming import run; run(*map(p.Path, sys.argv[1:]))"
FULL = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20)); "


def start(folder, out, code=RUN):
    return subprocess.Popen([sys.executable, "-c", code, str(folder), str(out)], stderr=subprocess.PIPE)


def reported(outcome):
    """All that a run reports of its scans. Its exit status depends on it."""
    return outcome.discs, outcome.failures, outcome.notes


def spoil(folder):
    """Scans that give no disc: one fails, one is left out."""
    jobs(folder)
    (folder / "scan0").write_text("black")
    (folder / "scan4").write_text("axial")


@pytest.mark.parametrize("shards", [1, 3])
def test_run_killed_at_any_moment_continues_as_if_it_had_not_been(tmp_path, folder, shards):
    """Bytes, notes, failures: those of an uninterrupted run; and no scan that was finished is cut again.

    A scan is finished, at the latest, when the next one is begun.
    """
    spoil(folder)
    whole = run(folder, tmp_path / "whole", shards=shards)
    assert len(whole.failures) == 1
    assert len(whole.notes) == 4
    (folder / "slow").touch()
    out, moments, finished = tmp_path / "killed", np.random.default_rng(shards), []
    for _ in range(3):
        forget_cuts(folder)
        process = start(folder, out, f"{RUN[:-1]}, shards={shards})")
        deadline = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline:
            if len(cuts(folder)) > 1 or cuts(folder) == ["5"]:  # it has finished a scan, or there is only the last
                break
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.5))
        process.kill()
        stderr = process.communicate()[1].decode()
        assert process.returncode == -signal.SIGKILL, stderr
        assert not set(finished) & set(cuts(folder))
        finished += in_turn(folder)[:-1]
        assert resuming.unfinished(out).exists()
        assert not (out / MANIFEST).exists()
    assert len(finished) >= 3
    forget_cuts(folder)
    (folder / "slow").unlink()
    outcome = run(folder, out, shards=shards)
    assert outcome.resumed >= len(finished)
    assert not set(finished) & set(cuts(folder))
    assert len(cuts(folder)) == 6 - outcome.resumed
    assert reported(outcome) == reported(whole)
    assert contents(out) == contents(tmp_path / "whole")
    assert not resuming.unfinished(out).exists()


def test_finished_scans_of_an_unfinished_shard_are_not_cut_again(tmp_path, folder, monkeypatch):
    """Stopped in the fifth of six scans, all of one shard."""
    spoil(folder)
    whole = run(folder, tmp_path / "whole", shards=1)
    with monkeypatch.context() as patched:
        patched.setattr("data_prep.dataset.resuming.save_scan", stop_at(3))
        with pytest.raises(KeyboardInterrupt):
            run(folder, tmp_path / "out", shards=1)
    forget_cuts(folder)
    outcome = run(folder, tmp_path / "out", shards=1)
    assert outcome.resumed == 3
    assert cuts(folder) == ["3", "4", "5"]
    assert reported(outcome) == reported(whole)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def stop_at(count):
    def save(*arguments):
        nonlocal count
        if not count:
            raise KeyboardInterrupt
        count -= 1
        save_scan(*arguments)

    return save


def test_failure_of_an_interrupted_run_is_reported_again_and_stops_a_strict_one(tmp_path, folder, monkeypatch):
    spoil(folder)
    out = tmp_path / "out"
    stop_before_manifest(monkeypatch, folder, out)
    with pytest.raises(SpinejaxError, match="scan0: its slices are black"):
        run(folder, out, strict=True)
    outcome = run(folder, out)
    assert outcome.failures == {"scan0": "scan0: its slices are black."}
    assert cuts(folder) == []


def test_scan_that_could_not_be_read_just_now_is_tried_again(tmp_path, folder, monkeypatch):
    jobs(folder)
    (folder / "scan0").unlink()
    (folder / "scan0").mkdir()  # reading it is an error of the system's, which may pass
    stop_before_manifest(monkeypatch, folder, tmp_path / "out")
    outcome = run(folder, tmp_path / "out")
    assert "cannot be read" in outcome.failures["scan0"]
    assert cuts(folder) == ["0"]


def test_scan_that_lacks_a_library_is_tried_again_once_it_may_be_there(tmp_path, folder, monkeypatch):
    jobs(folder)
    (folder / "scan0").write_text("packed")
    stop_before_manifest(monkeypatch, folder, tmp_path / "out")
    outcome = run(folder, tmp_path / "out")
    assert "pip install" in outcome.failures["scan0"]
    assert cuts(folder) == ["0"]


@pytest.mark.parametrize("function", ["data_prep.dataset.resuming.publish", "shutil.move", "shutil.copyfile"])
def test_run_killed_while_it_replaces_a_data_set_continues(tmp_path, folder, monkeypatch, function):
    """The old data set is whole until the new one is, and no reader finds a mixture of both."""
    out = tmp_path / "out"
    run(folder, out, shards=2)
    interrupted_in(function, monkeypatch, folder, out, overwrite=True)
    assert (out / MANIFEST).exists() == function.endswith("publish")
    assert run(folder, out, overwrite=True).resumed == 6
    assert cuts(folder) == []
    run(folder, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")
    assert not resuming.unfinished(out).exists()


def test_a_killed_run_that_replaces_keeps_its_scans_if_overwrite_is_forgotten(tmp_path, folder, monkeypatch):
    out = tmp_path / "out"
    run(folder, out, shards=2)
    stop_before_manifest(monkeypatch, folder, out, overwrite=True)
    with pytest.raises(SpinejaxError, match="Give --overwrite"):
        run(folder, out)
    assert run(folder, out, overwrite=True).resumed == 6


def stop_before_manifest(monkeypatch, folder, out, **options):
    interrupted_in("data_prep.dataset.build.write_manifest", monkeypatch, folder, out, **options)


def interrupted_in(function, monkeypatch, folder, out, **options):
    with monkeypatch.context() as patched:
        patched.setattr(function, interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(folder, out, **options)
    forget_cuts(folder)


def forget_cuts(folder):
    for path in folder.glob("cut-*"):
        path.unlink()


def interrupt(*_):
    raise KeyboardInterrupt


def test_scan_whose_file_has_changed_is_cut_again(tmp_path, folder, monkeypatch):
    out = tmp_path / "out"
    stop_before_manifest(monkeypatch, folder, out)
    (folder / "scan1").write_text("777")
    assert run(folder, out).resumed == 5
    assert cuts(folder) == ["1"]
    run(folder, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("damage", [b"", b"junk"])
def test_shard_that_an_interrupted_run_left_damaged_does_no_harm(tmp_path, folder, monkeypatch, damage):
    out = tmp_path / "out"
    stop_before_manifest(monkeypatch, folder, out)
    (resuming.unfinished(out) / "discs-00002-of-00003.h5").write_bytes(damage)
    assert run(folder, out).resumed == 6
    assert cuts(folder) == []
    run(folder, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("damage", [b"", b"junk", None])
def test_finished_scan_whose_file_was_damaged_is_cut_again(tmp_path, folder, monkeypatch, damage):
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr("data_prep.dataset.resuming.save_scan", stop_at(3))
        with pytest.raises(KeyboardInterrupt):
            run(folder, out, shards=1)
    kept = sorted(resuming.unfinished(out).glob("*.scan"))
    flipped = bytearray(kept[0].read_bytes())
    flipped[len(flipped) // 2] ^= 1
    kept[0].write_bytes(flipped if damage is None else damage)
    assert run(folder, out, shards=1).resumed == 2
    run(folder, tmp_path / "whole", shards=1)
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("options", [{"shards": 2}, {"preprocessing": {"width_px": 9}}])
def test_finished_scans_serve_a_run_with_other_options(tmp_path, folder, monkeypatch, options):
    stop_before_manifest(monkeypatch, folder, tmp_path / "out")
    assert run(folder, tmp_path / "out", **options).resumed == 6
    assert cuts(folder) == []
    run(folder, tmp_path / "whole", **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_two_writers_in_one_folder_are_refused(tmp_path, folder):
    (tmp_path / "out").mkdir()
    with resuming.only_writer(tmp_path / "out"), pytest.raises(SpinejaxError, match="is writing into this folder"):
        run(folder, tmp_path / "out")
    run(folder, tmp_path / "out")


def test_a_folder_that_no_run_created_is_refused(tmp_path, folder):
    run(folder, tmp_path / "out")
    other = resuming.unfinished(tmp_path / "out")
    other.mkdir()
    (other / MANIFEST).write_text("somebody's")
    with pytest.raises(SpinejaxError, match=r"out\.unfinished: the run needs this folder for its own files"):
        run(folder, tmp_path / "out", overwrite=True)
    assert (other / MANIFEST).read_text() == "somebody's"
    other.rename(tmp_path / "theirs")
    run(folder, tmp_path / "out", overwrite=True)
    assert not other.exists()


def test_a_data_set_that_is_being_replaced_has_one_writer(tmp_path, folder):
    run(folder, tmp_path / "out")
    with resuming.only_writer(tmp_path / "out"), pytest.raises(SpinejaxError, match="is writing into this folder"):
        run(folder, tmp_path / "out", overwrite=True)


def test_full_disk_is_one_message_and_the_run_continues(tmp_path, folder):
    """A limit on the size of files stands for the full disk: the same failed write, as often as one likes."""
    out = tmp_path / "out"
    process = start(folder, out, FULL + RUN)
    message = process.communicate()[1].decode()
    assert "out.unfinished: cannot be written" in message
    assert "it continues where it stopped" in message
    assert not list(out.glob("discs-*"))
    run(folder, out)
    run(folder, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


def test_files_that_name_scans_are_beside_the_data_set_and_readable_by_their_owner_only(tmp_path, folder, monkeypatch):
    spoil(folder)
    out = tmp_path / "out"
    stop_before_manifest(monkeypatch, folder, out)
    assert contents(out) == {}
    assert resuming.unfinished(out).stat().st_mode & 0o777 == 0o700
    assert any(b"scan0" in path.read_bytes() for path in resuming.unfinished(out).iterdir())
    run(folder, out)
    assert not resuming.unfinished(out).exists()


def test_what_a_run_left_that_was_killed_in_its_last_step_is_deleted(tmp_path, folder, monkeypatch):
    interrupted_in("shutil.rmtree", monkeypatch, folder, tmp_path / "out")
    assert resuming.unfinished(tmp_path / "out").exists()
    with pytest.raises(SpinejaxError, match="Give --overwrite"):
        run(folder, tmp_path / "out")
    assert not resuming.unfinished(tmp_path / "out").exists()


def meet(marks, number):
    """A scan that is cut only once four processes have begun one each."""
    (marks / str(os.getpid())).touch()
    deadline = time.monotonic() + 120
    while len(list(marks.iterdir())) < 4:
        if time.monotonic() > deadline:
            raise SpinejaxError(f"scan{number}: only {len(list(marks.iterdir()))} processes work.")
        time.sleep(0.01)
    return [DiscVolume("L4-L5", np.full(VOLUME_SHAPE, number, np.uint16), np.eye(4), (0, 15))], []


@pytest.mark.slow
def test_scans_of_one_shard_are_cut_by_as_many_processes_as_asked_for(tmp_path):
    (tmp_path / "marks").mkdir()
    cut_together = [partial(meet, tmp_path / "marks", n) for n in range(4)]
    made = [Cut(f"scan{n}", f"p{n}", f"s{n}", SPLITS[n % 3], {}, cut_together[n]) for n in range(4)]
    outcome = run_jobs(made, tmp_path / "out", shards=1, workers=4)
    assert outcome.failures == {}
    assert outcome.discs.total() == 4


# Who does the work ---------------------------------------------------------------------------------------------------


def run_all(work, *arguments, num_workers=1, scheduler=None):
    with workers(num_workers, scheduler) as run:
        return list(run(work, *arguments))


def die(number):
    if number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_worker_that_dies_is_one_message():
    with pytest.raises(SpinejaxError, match=r"A worker process died.*fewer --workers"):
        run_all(die, [0, 1, 2], num_workers=2)


def test_scheduler_that_is_not_there_is_one_message(monkeypatch):
    monkeypatch.setattr("data_prep.dataset.workers._CONNECT_SECONDS", 1)
    with pytest.raises(SpinejaxError, match=r"--scheduler tcp://127.0.0.1:9: no Dask scheduler answers"):
        run_all(die, [0], scheduler="tcp://127.0.0.1:9")


@pytest.fixture
def cluster():
    """A Dask cluster of two processes, which gives a task up when it has killed both."""
    distributed, dask = pytest.importorskip("distributed"), pytest.importorskip("dask")
    options = {"n_workers": 2, "threads_per_worker": 1, "processes": True, "dashboard_address": None}
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 1}),
        distributed.LocalCluster(host="127.0.0.1", **options) as started,
    ):
        yield started


def kill_worker(number):
    os.kill(os.getpid(), signal.SIGKILL)


def finish_and_die(marks, number):
    """The first to run 0 gives its result and is killed before anybody asks for it."""
    if number == 0 and not (marks / "died").exists():
        (marks / "died").touch()
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGKILL)).start()
    time.sleep(0 if number == 0 else 1)
    return number


def time_out(number):
    raise TimeoutError(f"the disk did not answer {number}")


@pytest.mark.filterwarnings("ignore")  # Dask's own, of ports and event loops
def test_cluster_without_workers_is_one_message_and_no_hang(monkeypatch):
    distributed = pytest.importorskip("distributed")
    monkeypatch.setattr("data_prep.dataset.workers._LOOK_SECONDS", 0.1)
    monkeypatch.setattr("data_prep.dataset.workers._WORKERLESS_SECONDS", 0.3)
    options = {"n_workers": 1, "processes": False, "protocol": "tcp", "dashboard_address": None}
    with distributed.LocalCluster(host="127.0.0.1", **options) as cluster:
        address = cluster.scheduler_address
        assert run_all(str, [1, 2], scheduler=address) == ["1", "2"]
        assert run_all(time.sleep, [0.7], scheduler=address) == [None]  # slow is not stuck
        with pytest.raises(TimeoutError, match="did not answer 7"):
            run_all(time_out, [7], scheduler=address)
        cluster.scale(0)
        deadline = time.monotonic() + 60
        while cluster.scheduler.workers and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(SpinejaxError, match=r"has had no worker for 0\.3 s. Start workers"):
            run_all(str, [1], scheduler=address)


class FailsAsTheWaitEnds:
    """A Dask future whose work fails between the end of a wait and the look at its status."""

    status = "pending"

    def result(self, timeout=None):
        if self.status == "error":
            raise ValueError("not a scan")
        self.status = "error"
        raise TimeoutError


def test_work_that_fails_as_the_wait_ends_says_why():
    pytest.importorskip("distributed")
    with pytest.raises(ValueError, match="not a scan"):
        module._dask_result(client=None, future=FailsAsTheWaitEnds())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Dask's own, of ports and event loops
def test_dask_cluster_of_processes(tmp_path, folder, cluster):
    """The same bytes as in one process, and a scan that kills every worker is one message."""
    run(folder, tmp_path / "whole")
    run(folder, tmp_path / "cluster", scheduler=cluster.scheduler_address)
    assert contents(tmp_path / "cluster") == contents(tmp_path / "whole")
    lost = run_all(partial(finish_and_die, tmp_path), [1, 2, 0], scheduler=cluster.scheduler_address)
    assert lost == [1, 2, 0]
    with pytest.raises(SpinejaxError, match="A worker process died"):
        run_all(kill_worker, [0], scheduler=cluster.scheduler_address)
