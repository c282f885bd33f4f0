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
    figures = {line.split("│")[1].strip(): line.split("│")[2:4] for line in printed.splitlines() if "│" in line}
    assert float(figures["maps, zlib 9"][1]) <= float(figures["maps, zlib 1"][1])
    assert all(float(ms) > 0 and float(kilobytes) > 0 for ms, kilobytes in figures.values())
