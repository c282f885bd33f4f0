"""The table of what it costs to write hotspots."""

import jax.numpy as jnp
import numpy as np

from benchmarks import writing
from spinejax.data.dataset import DataSet
from spinejax.geometry import WINDOW_SHAPE
from spinejax.inference.hotspots import Method
from spinejax.report import hotspot_files
from tests.conftest import TASKS


def test_every_way_has_its_time_and_bytes(tiny, tmp_path, capsys):
    data = DataSet(tiny)
    ramp = np.asarray(jnp.linspace(0, 1, np.prod(WINDOW_SHAPE)).reshape(WINDOW_SHAPE))
    maps = np.stack([ramp, ramp**2])
    grades = np.zeros((len(data), 2), int)
    path = tmp_path / "hotspots" / "hotspots.h5"
    path.parent.mkdir()
    hotspot_files.write_maps(path, [(0, maps), (1, maps)], data, TASKS, grades, Method())
    writing.main(writing.Arguments(tmp_path, tiny, turns=1))
    printed = capsys.readouterr().out
    assert "2 discs, 2 tasks" in printed
    figures = {
        line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:5]]
        for line in printed.splitlines()
        if "│" in line
    }
    assert float(figures["maps, HDF5, gzip 9"][2]) <= float(figures["maps, HDF5, gzip 1"][2])
    assert figures["maps, HDF5, gzip 1"][1].split()[0] == "1.00"
    assert figures["a disc's maps, HDF5, read, gzip 1"][2] == figures["maps, HDF5, gzip 1"][2]
    assert all(float(ms) > 0 and float(kilobytes) > 0 for ms, _, kilobytes in figures.values())
