"""Runs that are killed, run out of disk, or meet another run: they go on, to the same bytes."""

import os
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
from rich.console import Console

from data_prep import resume
from data_prep.build import Job, build
from data_prep.discs import DiscVolume
from data_prep.executors import run_all
from spinejax.errors import SpinejaxError
from spinejax.shards import MANIFEST, VOLUME_SHAPE
from spinejax.tasks import Task

TASKS = (Task("pfirrmann", ("1", "2", "3", "4", "5")),)
SPLITS = ("train", "validation", "test")


def cut(folder, number):
    """A disc whose brightness is in a file; each call leaves a mark, so that tests see who was cut."""
    (folder / f"cut-{number}-{time.monotonic_ns()}").touch()
    value = int((folder / f"scan{number}").read_text())
    if (folder / "slow").exists():
        time.sleep(0.2)
    volume = np.full(VOLUME_SHAPE, value, np.uint16)
    return [DiscVolume("L4-L5", volume, np.eye(4), (0, 15))], []


def jobs(folder, numbers=range(6)):
    for number in numbers:
        if not (folder / f"scan{number}").exists():
            (folder / f"scan{number}").write_text(f"{number + 1}000")
    return [
        Job(
            f"scan{n}", f"p{n}", f"s{n}", SPLITS[n % 3], {"L4-L5": {"pfirrmann": n % 5}}, partial(cut, folder, n),
            sources=(folder / f"scan{n}",),
        )
        for n in numbers
    ]  # fmt: skip


def run(folder, out, **options):
    settings = {"tasks": TASKS, "preprocessing": {}, "num_shards": 3, "console": Console(quiet=True)} | options
    return build(jobs(folder), out, **settings)


def contents(out):
    return {path.name: path.read_bytes() for path in out.iterdir()}


def cuts(folder):
    return sorted(path.name.split("-")[1] for path in folder.glob("cut-*"))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "scans").mkdir()
    return tmp_path / "scans"


RUN = "import sys, pathlib as p; from tests.test_resume import run; run(*map(p.Path, sys.argv[1:]))"
FULL = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20)); "


def start(folder, out, code=RUN):
    return subprocess.Popen([sys.executable, "-c", code, str(folder), str(out)], stderr=subprocess.PIPE)


def test_killed_run_goes_on_and_ends_in_the_same_bytes(tmp_path, folder):
    run(folder, tmp_path / "whole")
    (folder / "slow").touch()
    out = tmp_path / "killed"
    process = start(folder, out)
    first, second = out / "discs-00000-of-00003.h5", out / "discs-00001-of-00003.h5.tmp"
    while not (first.exists() and second.exists()):  # in the middle of the second shard
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (out / MANIFEST).exists()
    for path in folder.glob("cut-*"):
        path.unlink()
    (folder / "slow").unlink()
    outcome = run(folder, out)
    assert outcome.resumed == 1
    assert cuts(folder) == ["1", "2", "4", "5"]
    assert contents(out) == contents(tmp_path / "whole")


def stop_before_manifest(monkeypatch, folder, out):
    with monkeypatch.context() as patched:
        patched.setattr("data_prep.build.write_manifest", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(folder, out)
    for path in folder.glob("cut-*"):
        path.unlink()


def interrupt(*_):
    raise KeyboardInterrupt


def test_shard_whose_scan_has_changed_is_made_again(tmp_path, folder, monkeypatch):
    out = tmp_path / "out"
    stop_before_manifest(monkeypatch, folder, out)
    (folder / "scan1").write_text("777")
    assert run(folder, out).resumed == 2
    assert cuts(folder) == ["1", "4"]
    run(folder, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("damage", [b"", b"junk"])
def test_finished_shard_that_was_damaged_is_made_again(tmp_path, folder, monkeypatch, damage):
    out = tmp_path / "out"
    stop_before_manifest(monkeypatch, folder, out)
    (out / "discs-00002-of-00003.h5").write_bytes(damage)
    assert run(folder, out).resumed == 2
    assert cuts(folder) == ["2", "5"]


@pytest.mark.parametrize("options", [{"num_shards": 2}, {"preprocessing": {"width_px": 9}}])
def test_rest_of_another_run_is_not_gone_on_with(tmp_path, folder, monkeypatch, options):
    stop_before_manifest(monkeypatch, folder, tmp_path / "out")
    with pytest.raises(SpinejaxError, match=r"of another run\. Give --overwrite"):
        run(folder, tmp_path / "out", **options)
    assert run(folder, tmp_path / "out", overwrite=True, **options).resumed == 0


def test_two_writers_in_one_folder_are_refused(tmp_path, folder):
    (tmp_path / "out").mkdir()
    with resume.only_writer(tmp_path / "out"), pytest.raises(SpinejaxError, match="another run writes there"):
        run(folder, tmp_path / "out")
    run(folder, tmp_path / "out")


def test_full_disk_is_one_message_and_the_run_goes_on(tmp_path, folder):
    """A limit on the size of files stands for the full disk: the same failed write, as often as one likes."""
    out = tmp_path / "out"
    process = start(folder, out, FULL + RUN)
    message = process.communicate()[1].decode()
    assert "discs-00000-of-00003.h5: cannot be written" in message
    assert "it goes on where it stopped" in message
    assert not list(out.glob("discs-*"))
    run(folder, out)
    run(folder, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


def test_notes_of_a_run_name_nothing_but_pseudonyms(tmp_path, folder, monkeypatch):
    stop_before_manifest(monkeypatch, folder, tmp_path / "out")
    notes = b"".join(path.read_bytes() for path in (tmp_path / "out" / ".unfinished").iterdir())
    assert b"p3" in notes
    assert b"scan" not in notes
    assert str(folder).encode() not in notes


# Who does the work ---------------------------------------------------------------------------------------------------


def die(number):
    if number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_worker_that_dies_is_one_message():
    with pytest.raises(SpinejaxError, match=r"A worker process died.*fewer --workers"):
        list(run_all(die, [0, 1, 2], num_workers=2, scheduler=None))


def test_scheduler_that_is_not_there_is_one_message(monkeypatch):
    monkeypatch.setattr("data_prep.executors._CONNECT_SECONDS", 1)
    with pytest.raises(SpinejaxError, match=r"--scheduler tcp://127.0.0.1:9: no Dask scheduler answers"):
        list(run_all(die, [0], num_workers=1, scheduler="tcp://127.0.0.1:9"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Dask's own, of ports and event loops
def test_dask_cluster_of_processes_gives_the_same_bytes(tmp_path, folder):
    distributed = pytest.importorskip("distributed")
    run(folder, tmp_path / "whole")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, host="127.0.0.1"
    ) as cluster:
        run(folder, tmp_path / "cluster", scheduler=cluster.scheduler_address)
    assert contents(tmp_path / "cluster") == contents(tmp_path / "whole")
