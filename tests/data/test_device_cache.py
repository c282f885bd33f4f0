"""Discs in device memory are the discs that are read: the same batches, bit for bit."""

import itertools
import re

import jax
import numpy as np
import pytest

from spinejax.data import device_cache
from spinejax.data.batches import eval_batches, train_batches
from spinejax.data.dataset import DataSet
from spinejax.data.device_cache import DeviceCache
from spinejax.errors import SpinejaxError
from spinejax.parallel import devices, memory


@pytest.fixture(scope="module")
def data(tiny):
    return DataSet(tiny)


@pytest.fixture(scope="module")
def cache(data):
    return DeviceCache(data, np.concatenate([data.rows("train"), data.rows("validation")]), devices.make_mesh())


def same(read, cached):
    assert read.keys() == cached.keys()
    for name in read:
        assert read[name].dtype == cached[name].dtype
        assert cached[name].sharding.is_equivalent_to(read[name].sharding, read[name].ndim), name
        np.testing.assert_array_equal(read[name], cached[name])


def test_cached_training_batches_equal_those_that_are_read(data, cache):
    mesh = devices.make_mesh()
    options = {"columns": [0, 1], "batch_size": 8, "seed": 5, "step": 2}
    streams = [train_batches(data, **options, volumes=volumes) for volumes in (True, False)]
    for read, numbers in itertools.islice(zip(*streams, strict=True), 5):  # into the next passes over the 24 discs
        assert "volume" not in numbers
        same(devices.put_batch(read, mesh), cache.put(numbers))
    for stream in streams:
        stream.close()


def test_cached_padded_batches_equal_those_that_are_read(data, cache):
    mesh, rows = devices.make_mesh(), data.rows("validation")
    streams = [eval_batches(data, rows, [1], batch_size=16, volumes=volumes) for volumes in (True, False)]
    (read,), (numbers,) = map(list, streams)
    assert not read["valid"].all()
    same(devices.put_batch(read, mesh), cache.put(numbers))


def test_each_device_has_its_share_and_a_batch_is_transferred_once(cache):
    voxels = cache._voxels
    assert voxels.nbytes == 30 * 192 * 320 * 15 * 2
    assert {shard.data.nbytes for shard in voxels.addressable_shards} == {voxels.nbytes // 8}
    place = devices.put_batch({"place": np.arange(8, dtype=np.int32)}, devices.make_mesh())["place"]
    program = device_cache._take.lower(voxels, place, mesh=devices.make_mesh()).compile().as_text()
    assert "all-to-all" in program
    # The row numbers are gathered; no volume is.
    assert not re.search(r"u16\[[^=]* (all-gather|all-reduce)\(", program)


def test_a_disc_that_is_not_in_the_cache_is_refused(data, cache):
    batch = next(eval_batches(data, data.rows("test"), [0], batch_size=8, volumes=False))
    with pytest.raises(SpinejaxError, match="not in device memory"):
        cache.put(batch)


def test_what_does_not_fit_is_refused_with_the_figures(data, monkeypatch):
    device_cache.check_fits(12018, 12018 * 192 * 320 * 15 * 2 // 8, int(16e9), 8)
    with pytest.raises(SpinejaxError, match=r"12,018 discs are 22.2 GB, 22.15 GB on each of 1 devices; 12.80 GB can"):
        device_cache.check_fits(12018, 12018 * 192 * 320 * 15 * 2, int(16e9), 1)
    monkeypatch.setattr(device_cache, "free_bytes", lambda mesh: 1_000_000)
    with pytest.raises(SpinejaxError, match=r"--cache device: 7 discs.*leave --cache out"):
        DeviceCache(data, np.arange(1, 7), devices.make_mesh())


def test_discs_are_kept_unasked_if_they_take_half_of_the_free_memory(monkeypatch):
    """The paper's 12,018 discs, 22.2 GB: on 16 GB of each of 4 devices, and not of 2."""
    for num_devices, fits in ((2, False), (4, True)):
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:num_devices]), ("data",))
        monkeypatch.setattr(device_cache, "free_bytes", lambda mesh: int(16e9))
        assert device_cache.fits_unasked(12018, mesh) == fits


def test_free_memory_is_counted(monkeypatch):
    assert memory.available_bytes() > 2**20
    monkeypatch.setattr(memory, "available_bytes", lambda: 80_000)
    assert jax.device_count() == 8
    assert memory.free_bytes(devices.make_mesh()) == 10_000


MEMINFO = {"proc/meminfo": "MemTotal:       24684084 kB\nMemFree:          300000 kB\nMemAvailable:   20000000 kB\n"}
V2, V1 = "sys/fs/cgroup/", "sys/fs/cgroup/memory/"
USED = "anon 3\ninactive_anon 5\nactive_anon 7\ninactive_file 200\nactive_file 1000\ntotal_inactive_file 900\n"


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, 20_480_000_000),  # the page cache is as good as free
        ({V2 + "memory.max": "max\n", V2 + "memory.current": "4000\n"}, 20_480_000_000),
        ({V2 + "memory.max": "9000\n", V2 + "memory.current": "4000\n"}, 5000),
        ({V2 + "memory.max": "9000\n", V2 + "memory.current": "4000\n", V2 + "memory.stat": USED}, 6200),
        ({V2 + "memory.max": "9000\n", V2 + "memory.current": "9500\n"}, 0),
        ({V2 + "memory.max": "30000000000\n", V2 + "memory.current": "4000\n"}, 20_480_000_000),
        ({V1 + "memory.limit_in_bytes": "9223372036854771712\n"}, 20_480_000_000),
        (
            {
                V1 + "memory.limit_in_bytes": "9000\n",
                V1 + "memory.usage_in_bytes": "4000\n",
                V1 + "memory.stat": USED,
            },
            6200,
        ),
    ],
)
def test_available_memory_is_limited_by_machine_and_container(tmp_path, files, free):
    for name, text in (MEMINFO | files).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert memory.available_bytes(tmp_path) == free


def test_without_proc_meminfo_free_pages_are_counted(tmp_path):
    assert memory.available_bytes(tmp_path) > 2**20
