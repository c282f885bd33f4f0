"""Several processes, over the loopback device, are one run: same curve, same discs, and they end together."""

import csv
import json
import shutil
import signal
import subprocess
import sys
import time

import h5py
import jax
import numpy as np
import pytest

import spinejax
from data_prep.read.metaimage import write_mha
from spinejax.parallel import processes
from spinejax.training import checkpoint
from tests.block_spine import block_spine
from tests.conftest import write_tiny
from tests.running import environment, figures, free_address, read_line, train_command

pytestmark = pytest.mark.slow
# Another number of processes sums in another order. At the preset's rate the first difference of 1e-8 grows in this
# narrow network tenfold a step and more, where a ReLU or a pool flips; at this rate it stays where it began.
GENTLY = ("--learning-rate", "1e-4", "--epochs")


@pytest.fixture(scope="module")
def stopped(tiny, launcher, tmp_path_factory):
    """A run of two processes of which the second, and it alone, got SIGTERM after the first epoch."""
    run = tmp_path_factory.mktemp("two") / "run"
    with launcher.together(*[train_command(tiny, run, *GENTLY, 1000)] * 2) as processes:
        processes[0].wait_until(lambda: latest(run))
        # JAX looks for a notice once a second. The first process, and with it the run, waits that long.
        processes[0].send(signal.SIGSTOP)
        processes[1].send(signal.SIGTERM)
        processes[1].wait_until(lambda: "SIGTERM caught" in processes[1].errors())
        processes[0].send(signal.SIGCONT)
        ends = [process.end() for process in processes]
    return run, ends


@pytest.fixture(scope="module")
def epochs(stopped):
    """As many as let the stopped run go on for more than one."""
    return max(4, latest(stopped[0]) // 3 + 2)


@pytest.fixture(scope="module")
def alone(tiny, launcher, epochs, tmp_path_factory):
    run = tmp_path_factory.mktemp("alone") / "run"
    end = launcher.run(train_command(tiny, run, *GENTLY, epochs))
    assert end.status == 0, end
    return run


def latest(run):
    return checkpoint.Checkpoints(run, read_only=True).latest_step()


def same_curve(run, other):
    for one, two in zip(figures(run), figures(other), strict=True):
        assert one.keys() == two.keys()
        for name in one:
            np.testing.assert_allclose(one[name], two[name], rtol=1e-4, err_msg=name)


def test_a_stop_notice_to_one_process_saves_and_ends_all_with_status_0(stopped):
    run, ends = stopped
    assert [end.status for end in ends] == [0, 0], ends
    assert f"is saved at step {latest(run)}: start it again to go on" in ends[0].stdout
    assert ends[1].printed == []


@pytest.mark.parametrize("num_processes", [1, 4])
def test_a_run_of_two_processes_goes_on_with_other_numbers_and_has_the_curve_of_one(
    stopped, alone, epochs, tiny, launcher, tmp_path, num_processes
):
    run = shutil.copytree(stopped[0], tmp_path / "run")
    command = train_command(tiny, run, *GENTLY, epochs)
    if num_processes == 1:
        ends = [launcher.run(command)]
    else:
        with launcher.together(*[command] * num_processes) as processes:
            ends = [process.end() for process in processes]
    assert [end.status for end in ends] == [0] * num_processes, ends
    same_curve(run, alone)
    networks = [spinejax.load(folder / "checkpoints" / str(3 * epochs))[1] for folder in (run, alone)]
    jax.tree.map(lambda one, two: np.testing.assert_allclose(one, two, atol=1e-5), *networks)


def test_parameters_and_discs_split_over_processes_give_the_curve_of_one(tiny, launcher, tmp_path):
    """fc6, fc7 and the data set lie half here, half there; each step and each save brings them together."""
    one, two = (train_command(tiny, tmp_path / name, *GENTLY, 2, "--cache", "device") for name in ("one", "two"))
    with launcher.together(*[[*two, "--layout", "split"]] * 2) as processes:
        ends = [launcher.run(one), *(process.end() for process in processes)]
    assert [end.status for end in ends] == [0, 0, 0], ends
    assert "a dimension does not divide by the 2 devices" in ends[1].stdout  # conv2 has five features at this width
    same_curve(tmp_path / "two", tmp_path / "one")
    networks = [spinejax.load(tmp_path / name / "checkpoints" / "6")[1] for name in ("one", "two")]
    jax.tree.map(lambda one, two: np.testing.assert_allclose(one, two, atol=1e-5), *networks)


def test_a_batch_that_does_not_divide_by_the_devices_of_all_is_refused(tiny, launcher, tmp_path):
    with launcher.together(*[train_command(tiny, tmp_path / "run", "--batch-size", "9")] * 2) as processes:
        ends = [process.end() for process in processes]
    assert [end.status for end in ends] == [2, 2]
    assert "Option --batch-size is 9: expected a multiple of the 2 devices" in ends[0].said[-1]


def test_evaluation_grades_every_disc_once_at_any_number_of_processes(alone, tiny, launcher, tmp_path):
    tables = []
    for num_processes in (1, 4):  # six discs in batches of four: the last batch is half padding
        out = tmp_path / str(num_processes)
        options = ["--checkpoint", alone, "--data", tiny, "--split", "test", "--out", out, "--batch-size", "4"]
        with launcher.together(*[["evaluate.py", *options]] * num_processes) as processes:
            ends = [process.end() for process in processes]
        assert [end.status for end in ends] == [0] * num_processes, ends
        assert [bool(end.printed) for end in ends] == [True] + [False] * (num_processes - 1)
        with open(out / "predictions.csv") as file:
            tables.append(list(csv.DictReader(file)))
    assert len(tables[0]) == len({(row["scan"], row["level"]) for row in tables[0]}) == 6
    same_grades(*tables)


def same_grades(*tables):
    for one, two in zip(*tables, strict=True):
        for name, value in one.items():
            try:
                np.testing.assert_allclose(float(value), float(two[name]), atol=1e-5, err_msg=name)
            except ValueError:
                assert value == two[name], name


def test_raw_scans_are_cut_once_and_graded_together(alone, launcher, tmp_path):
    spine = block_spine(spacing_mm=(1.5, 1.5, 6.0), num_slices=5)
    for folder, scan in (("images", spine.scan), ("masks", spine.mask)):
        (tmp_path / folder).mkdir()
        write_mha(tmp_path / folder / "one_t2.mha", scan)
    tables = []
    for num_processes in (1, 2):
        out = tmp_path / str(num_processes)
        scans = ["--scan", tmp_path / "images", "--masks", tmp_path / "masks", "--key", tmp_path / "key"]
        command = ["evaluate.py", "--checkpoint", alone, *scans, "--out", out, "--batch-size", "4"]
        with launcher.together(*[command] * num_processes) as processes:
            ends = [process.end() for process in processes]
        assert [end.status for end in ends] == [0] * num_processes, ends
        assert not any(end.printed for end in ends[1:])
        with open(out / "predictions.csv") as file:
            tables.append(list(csv.DictReader(file)))
    assert len(tables[0]) == 4
    same_grades(*tables)


def test_two_processes_calibrate_explain_and_report_as_one_does(alone, tiny, launcher, tmp_path):
    found = []
    for num_processes in (1, 2):
        folder = tmp_path / str(num_processes)
        shutil.copytree(alone, folder / "run")  # without temperatures
        options = ["--checkpoint", folder / "run", "--data", tiny, "--out", folder / "out", "--batch-size", "4"]
        options += ["--hotspots", "--hotspot.num-views", "2", "--calibrate", "--report", folder / "page"]
        with launcher.together(*[["evaluate.py", *options]] * num_processes) as processes:
            ends = [process.end() for process in processes]
        assert [end.status for end in ends] == [0] * num_processes, ends
        assert not any(end.printed for end in ends[1:])
        assert "Temperatures are stored in" in ends[0].stdout
        assert ("Each device has a copy of the network (2 devices)." in ends[0].stdout) is (num_processes == 2)
        with h5py.File(folder / "out" / "hotspots" / "hotspots.h5") as file:
            maps = file["map"][()] * file["step"][()][..., None, None, None]
        results = json.loads((folder / "out" / "results.json").read_text())
        page = (folder / "page" / "index.html").read_text()
        names = sorted(path.name for path in folder.rglob("*.nii.gz"))
        found.append(
            (maps, names, set(results), page.count("data:image") + page.count("maps-"), results["calibration"])
        )
    one, two = found
    np.testing.assert_allclose(two[0], one[0], atol=0.02 * one[0].max())  # a map is stored in 255 steps
    assert len(one[1]) == 12
    assert two[1:4] == one[1:4]
    for name, each in one[4].items():
        assert two[4][name] == pytest.approx(each, rel=1e-3)


@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_process_is_killed_the_other_ends_within_30_seconds(tiny, launcher, tmp_path, victim):
    run = tmp_path / "run"
    with launcher.together(*[train_command(tiny, run, "--epochs", 500)] * 2) as processes:
        processes[0].wait_until(lambda: figures(run))
        processes[victim].kill()
        start = time.monotonic()
        end = processes[1 - victim].end()
        assert time.monotonic() - start < 30
    assert end.status != 0
    assert "Traceback" not in end.stderr
    # When the first process is gone, JAX's own end of the others may come before ours.
    by_us = len(end.said) == 1 and "Another process of this run ended" in end.said[0]
    assert by_us or (victim == 0 and "another task died" in end.stderr), end.stderr


def test_when_one_process_meets_a_damaged_shard_it_says_so_and_the_other_ends_too(tiny, launcher, tmp_path):
    harmed = shutil.copytree(tiny, tmp_path / "harmed")
    shard = max(harmed.glob("*.h5"))
    data = bytearray(shard.read_bytes())
    for place in range(len(data) // 3, len(data), len(data) // 50):
        data[place] ^= 255
    shard.write_bytes(data)
    commands = [train_command(folder, tmp_path / "run", "--epochs", 500) for folder in (tiny, harmed)]
    with launcher.together(*commands) as processes:
        ends = [process.end() for process in processes]
    assert ends[1].status == 2
    assert any("damaged" in line and shard.name in line for line in ends[1].said), ends
    assert ends[0].status != 0
    assert "Traceback" not in ends[0].stderr + ends[1].stderr


def test_another_data_set_on_one_process_is_refused(tiny, launcher, tmp_path):
    other = write_tiny(tmp_path / "other", seed=5)
    with launcher.together(*[train_command(folder, tmp_path / "run") for folder in (tiny, other)]) as processes:
        ends = [process.end() for process in processes]
    assert ends[1].status == 2
    assert "Process 1 has other data than the first process" in ends[1].said[-1]
    assert ends[0].status != 0


def test_more_processes_than_discs_to_validate_work(launcher, tmp_path):
    data = write_tiny(tmp_path / "data", num_patients=(4, 2, 1), levels=("L4-L5",))
    with launcher.together(*[train_command(data, tmp_path / "run", "--epochs", 1)] * 4) as processes:
        ends = [process.end() for process in processes]
    assert [end.status for end in ends] == [0] * 4, ends
    assert len(figures(tmp_path / "run")) == 1


@pytest.mark.parametrize("place", ["0", "1"])
def test_without_a_network_between_them_each_process_says_so_and_ends(tiny, launcher, tmp_path, place):
    command = train_command(tiny, tmp_path / "run", "--distributed", "--start-seconds", 2)
    with free_address() as address:
        lost = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": place}
        end = launcher.run(command, **lost)
    assert end.status == 2
    assert len(end.said) == 1
    assert "not all processes met within 2 seconds" in end.said[0]
    assert address in end.said[0]


def test_initial_weights_are_those_that_the_first_process_reads(alone, tiny, launcher, tmp_path):
    """The processes have different copies at the same path."""
    commands = []
    for place, seed in enumerate((0, 1)):
        folder = tmp_path / str(place)
        if place == 0:
            shutil.copytree(alone / "export", folder / "start")
        else:
            other = train_command(tiny, tmp_path / "other", "--epochs", 1, "--seed", seed)
            assert launcher.run(other).status == 0
            shutil.copytree(tmp_path / "other" / "export", folder / "start")
        commands.append(train_command(tiny, tmp_path / "run", *GENTLY, 1, "--init-from", "start"))
    with launcher.together(*commands, folders=[tmp_path / "0", tmp_path / "1"]) as started:
        ends = [process.end() for process in started]
    assert [end.status for end in ends] == [0, 0], ends
    end = launcher.run(train_command(tiny, tmp_path / "one", *GENTLY, 1, "--init-from", alone / "export"))
    assert end.status == 0, end
    same_curve(tmp_path / "run", tmp_path / "one")


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        ("UNKNOWN: Gloo all-reduce failed: [pair.cc:547] Connection closed by peer [127.0.0.1]:43210", True),
        ("INTERNAL: Gloo AllGather failed: Read error [127.0.0.1]:2: Connection reset by peer", True),
        ("NCCL operation failed: remote process exited or there was a network error", True),
        ("UNAVAILABLE: Failed to send RPC to coordination service. Either the leader task was preempted", True),
        ("coordination: the following tasks are unhealthy (stopped sending heartbeats): task 1", True),
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 12884901888 bytes for the NCCL buffers", False),
        ("NCCL operation failed: unhandled system error. Error while creating shared memory segment /dev/shm/nccl-1 "
         "(size 9637888): No space left on device", False),
        ("INTERNAL: NCCL operation ncclCommInitRank failed: unhandled cuda error", False),
        ("Gloo context initialization failed: no interface with a usable address", False),
        ("coordination_agent: invalid argument", False),
        ("Connection reset by peer", False),
    ],
)  # fmt: skip
def test_only_a_lost_process_is_reported_as_one(text, lost, capsys):
    assert processes._status(RuntimeError(text)) == (2 if lost else 1)
    said = capsys.readouterr().err
    assert text in said
    assert ("Another process of this run ended" in said) == lost


def test_sigterm_ends_a_process_that_has_nothing_to_save(compiled):
    """JAX would take it for a notice, and the scheduler would have to kill the process."""
    program = (
        "import time; from spinejax.parallel import processes\n"
        "with processes.started(True):\n    processes.end_on_sigterm(); print('ready', flush=True); time.sleep(120)"
    )
    with free_address() as address:
        shared = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
        started = [
            subprocess.Popen(
                [sys.executable, "-c", program],
                env=environment(compiled) | shared | {"JAX_PROCESS_ID": place},
                stdout=subprocess.PIPE,
                text=True,
            )
            for place in ("0", "1")
        ]
        try:
            assert [read_line(process.stdout) for process in started] == ["ready\n"] * 2
            started[1].terminate()
            assert started[1].wait(timeout=30) == -signal.SIGTERM
        finally:
            for process in started:
                process.kill()
                process.communicate()


def test_an_environment_that_names_no_other_process_is_one_message(tiny, launcher, tmp_path):
    end = launcher.run(train_command(tiny, tmp_path / "run", "--distributed"))
    assert end.status == 2
    assert len(end.said) == 1
    assert "JAX_COORDINATOR_ADDRESS" in end.said[0]
