"""Which discs a step sees depends on (seed, step) alone: not on hosts, workers or restarts."""

import itertools
import json
import shutil

import grain
import numpy as np
import pytest

from spinejax.data.batches import eval_batches, eval_rows, num_steps, train_batches
from spinejax.data.dataset import DataSet
from spinejax.errors import SpinejaxError


@pytest.fixture(scope="module")
def data(tiny):
    return DataSet(tiny)


def rows(batches, number):
    return np.stack([batch["row"] for batch in itertools.islice(batches, number)])


def test_an_epoch_holds_every_training_disc_once_and_the_next_is_in_another_order(data):
    drawn = rows(train_batches(data, [0, 1], batch_size=8, seed=1), 6)
    epochs = drawn.reshape(2, 24)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), data.rows("train"))
    assert not np.array_equal(*epochs)
    other = rows(train_batches(data, [0, 1], batch_size=8, seed=2), 3).ravel()
    assert not np.array_equal(other, epochs[0])


def test_the_order_is_that_of_grains_own_classes(data):
    """Runs that were begun with them go on; 10 does not divide the 24 discs of an epoch."""
    order = grain.MapDataset.range(24).shuffle(seed=2**32 - 1).repeat().batch(10)
    drawn = rows(train_batches(data, [0], batch_size=10, seed=2**32 - 1, volumes=False), 9)
    np.testing.assert_array_equal(drawn, data.rows("train")[np.stack([order[step] for step in range(9)])])


def test_resuming_at_a_step_gives_the_same_batches(data):
    straight = rows(train_batches(data, [0, 1], batch_size=10, seed=1), 9)
    for step in (1, 4, 8):
        resumed = rows(train_batches(data, [0, 1], batch_size=10, seed=1, step=step), 9 - step)
        np.testing.assert_array_equal(resumed, straight[step:])


@pytest.mark.parametrize("num_hosts", [2, 4])
def test_hosts_together_see_the_batches_of_one(data, num_hosts):
    alone = rows(train_batches(data, [0, 1], batch_size=8, seed=1), 5)
    parts = [
        rows(train_batches(data, [0, 1], batch_size=8, seed=1, host=host, num_hosts=num_hosts), 5)
        for host in range(num_hosts)
    ]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), alone)


def test_worker_processes_change_nothing(data):
    alone = rows(train_batches(data, [0, 1], batch_size=8, seed=1, step=2), 4)
    batches = train_batches(data, [0, 1], batch_size=8, seed=1, step=2, workers=2)
    np.testing.assert_array_equal(rows(batches, 4), alone)
    batches.close()


def test_a_batch_has_the_discs_of_its_rows(data):
    batch = next(train_batches(data, [1], batch_size=8, seed=1))
    assert {name: (value.dtype.name, value.shape) for name, value in batch.items()} == {
        "volume": ("uint16", (8, 192, 320, 15)),
        "labels": ("int32", (8, 1)),
        "source": ("int32", (8,)),
        "row": ("int32", (8,)),
        "valid": ("bool", (8,)),
    }
    for place, row in enumerate(batch["row"]):
        np.testing.assert_array_equal(batch["volume"][place], data.volume(row))
        np.testing.assert_array_equal(batch["labels"][place], data.labels[row, [1]])


def test_a_batch_tells_each_discs_source(tiny, tmp_path):
    """In alphabetical order of the names; one source for all where the manifest names none."""
    assert (DataSet(tiny).source == 0).all()
    shutil.copytree(tiny, tmp_path / "two")
    path = tmp_path / "two" / "manifest.json"
    names = {
        scan: ("spider", "elsewhere")[place % 2] for place, scan in enumerate(np.unique(DataSet(tiny).scan).tolist())
    }
    scans = {scan: {"source": name, "contrast": "t2"} for scan, name in names.items()}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"scans": scans}))
    data = DataSet(tmp_path / "two")
    batch = next(train_batches(data, [0], batch_size=8, seed=1, volumes=False))
    assert {0, 1} == set(batch["source"].tolist())
    expected = [("elsewhere", "spider").index(names[scan]) for scan in data.scan[batch["row"]].tolist()]
    assert batch["source"].tolist() == expected


@pytest.mark.parametrize("threads", [1, 3, 40])
def test_any_number_of_threads_reads_the_same_discs(data, threads):
    drawn = np.random.default_rng(0).permutation(len(data))[:17]  # of both shards; more threads than discs, too
    np.testing.assert_array_equal(data.volumes(drawn, threads=threads), np.stack([data.volume(row) for row in drawn]))
    batch = next(train_batches(data, [1], batch_size=8, seed=1, read_threads=threads))
    np.testing.assert_array_equal(batch["volume"], data.volumes(batch["row"]))


def test_a_damaged_disc_is_named_whichever_thread_reads_it(data, tiny, tmp_path):
    copy = DataSet(shutil.copytree(tiny, tmp_path / "copy"))
    copy.volumes(np.arange(2))  # both shards are open
    content = bytearray(copy.paths[1].read_bytes())
    content[len(content) // 2] ^= 1
    copy.paths[1].write_bytes(content)
    with pytest.raises(SpinejaxError, match=rf"{copy.paths[1].name}: damaged.*disc \d+ does not fit its checksum"):
        copy.volumes(np.arange(len(copy)), threads=4)
    with open(copy.paths[1], "r+b") as file:
        file.truncate(len(content) // 4)
    with pytest.raises(SpinejaxError, match=rf"{copy.paths[1].name}: damaged.*disc \d+ is cut short"):
        copy.volumes(np.arange(len(copy)), threads=4)


@pytest.mark.parametrize("num_hosts", [1, 2])
def test_evaluation_reads_every_disc_once_in_order_and_marks_padding(data, num_hosts):
    wanted = data.rows("train")[:21]
    parts = [
        list(eval_batches(data, wanted, [0], batch_size=8, host=host, num_hosts=num_hosts)) for host in range(num_hosts)
    ]
    assert {len(part) for part in parts} == {3}  # hosts take equal numbers of steps
    seen = np.concatenate([batch["row"][batch["valid"]] for step in zip(*parts, strict=True) for batch in step])
    np.testing.assert_array_equal(seen, wanted)
    for host, part in enumerate(parts):
        read = {int(row) if row >= 0 else 0 for batch in part for row in batch["row"]}  # padding repeats disc 0
        assert read == set(eval_rows(wanted, batch_size=8, host=host, num_hosts=num_hosts).tolist())


def test_a_batch_that_does_not_divide_by_the_hosts_is_refused(data):
    with pytest.raises(SpinejaxError, match="multiple of the 3 hosts"):
        next(train_batches(data, [0], batch_size=8, seed=0, num_hosts=3))


def test_steps_of_an_epoch():
    assert [num_steps(n, 32) for n in (1, 31, 32, 63, 64)] == [1, 1, 1, 1, 2]


def test_more_hosts_than_discs_read_each_disc_once(data):
    rows = data.rows("validation")
    parts = [
        next(eval_batches(data, rows, [0], batch_size=16, host=host, num_hosts=16, volumes=False)) for host in range(16)
    ]
    seen = np.concatenate([part["row"][part["valid"]] for part in parts])
    np.testing.assert_array_equal(seen, rows)
    trained = [
        next(train_batches(data, [0], batch_size=32, seed=0, host=host, num_hosts=32, volumes=False))["row"]
        for host in range(32)
    ]
    assert set(np.concatenate(trained)) == set(data.rows("train"))
