"""Maps on disk: a lesion planted at a place in the patient is where the written map has its peak."""

import gzip
import json

import h5py
import jax
import jax.numpy as jnp
import nibabel
import numpy as np
import pytest

from data_prep.anatomy.discs import extract_discs
from data_prep.read.scan import Scan
from spinejax.data.dataset import DataSet
from spinejax.data.manifest import write_manifest
from spinejax.data.shards import Disc, write_shard
from spinejax.errors import SpinejaxError
from spinejax.geometry import central_window
from spinejax.inference import hotspots
from spinejax.inference.hotspots import Method
from spinejax.report import hotspot_files
from tests.block_spine import FAT, block_spine
from tests.conftest import TASKS, a_disc
from tests.data_prep.anatomy.test_discs import true_bodies
from tests.inference.test_hotspots import Energy

LEVEL = "L4-L5"


@pytest.fixture(scope="module")
def planted():
    """A scan turned in space with one bright lesion in L5, below the disc, and its place in mm LPS."""
    spine = block_spine(angles_deg=(10.0, -8.0))
    row, column = spine.corners["L5"][:2].mean(0)
    centre = np.array([row + 8, column + 5, spine.scan.voxels.shape[2] // 2 + 1])
    grid = np.stack(np.meshgrid(*map(np.arange, spine.scan.voxels.shape), indexing="ij"), -1)
    blob = np.exp(-((((grid - centre) * spine.scan.spacing_mm) / (2.0, 2.0, 3.0)) ** 2).sum(-1))
    dim = np.where(spine.mask.voxels == 100, FAT, spine.scan.voxels)  # the canal's fluid is as bright as a lesion
    voxels = (dim * (1 - blob) + 400 * blob).astype(np.float32)
    return Scan(voxels, spine.scan.affine, "planted"), true_bodies(spine), (spine.scan.affine @ [*centre, 1])[:3]


@pytest.fixture(scope="module")
def data(planted, tmp_path_factory):
    scan, bodies, _ = planted
    (cut,) = [disc for disc in extract_discs(scan, bodies) if disc.level == LEVEL]
    fields = {"labels": {"brightness": 1}, "patient": "p1", "scan": "p1-t2", "split": "test"}
    disc = Disc(volume=cut.volume, affine=cut.affine, slices=cut.slices, level=LEVEL, **fields)
    folder = tmp_path_factory.mktemp("planted")
    summary = write_shard(folder / "discs-00000-of-00001.h5", [disc], TASKS)
    write_manifest(folder, [summary], TASKS, {"source": "test"}, ())
    return DataSet(folder)


@pytest.fixture(scope="module")
def maps(data):
    """Maps of a network whose evidence is brightness, over random views."""
    batch = {
        "volume": jnp.asarray(np.where(data.volumes(np.array([0])) > 45000, 65535, 0), jnp.uint16),
        "slices": jnp.asarray(data.slices, jnp.int32),
        "grades": jnp.zeros((1, 2), jnp.int32),
        "row": jnp.zeros(1, jnp.int32),
    }
    method = Method(num_views=4, views_at_once=4)
    return np.asarray(hotspots.hotspot_step(jax.random.key(0), {}, batch, model=Energy(), method=method))


def centroid_mm(map, affine):
    hot = np.argwhere(map > 0.5 * map.max()).mean(0)
    return (affine @ [*hot, 1])[:3]


def test_a_planted_lesion_is_at_its_place_in_patient_space(planted, data, maps, tmp_path):
    _, _, lesion_lps_mm = planted
    hotspot_files.write_nifti(tmp_path, data, 0, TASKS, maps[0])
    image = nibabel.load(tmp_path / f"p1-t2_{LEVEL}_brightness.nii.gz")
    found_ras_mm = centroid_mm(image.get_fdata(), image.affine)
    np.testing.assert_allclose(found_ras_mm, lesion_lps_mm * (-1, -1, 1), atol=1.5)
    assert image.get_data_dtype() == np.uint8
    np.testing.assert_allclose(image.get_fdata(), maps[0, 0], atol=maps[0, 0].max() / 255)
    with gzip.open(tmp_path / f"p1-t2_{LEVEL}_side.nii.gz") as file:
        assert b"research use only" in file.read(348)


def test_window_affine_is_that_of_the_central_window(data):
    volume_place, window_place = (70, 100, 6), (70 - 40, 100 - 48, 6 - 3)
    assert central_window(data.volume(0))[window_place] == data.volume(0)[volume_place]
    np.testing.assert_allclose(
        hotspot_files.window_affine(data.affine[0]) @ [*window_place, 1], data.affine[0] @ [*volume_place, 1]
    )


@pytest.mark.parametrize("signed", [False, True])
def test_hdf5_keeps_the_maps_to_eight_bits(data, maps, tmp_path, signed):
    written = maps[0] * np.where(signed & (np.arange(9) % 2), -1, 1).astype(np.float32)
    written[1] = 0
    path = tmp_path / "hotspots.h5"
    hotspot_files.write_maps(path, [(0, written)], data, TASKS, np.array([[2, 1]]), Method(signed=signed))
    with h5py.File(path) as file:
        back = file["map"][0] * file["step"][0][:, None, None, None]
        np.testing.assert_allclose(back, written, atol=maps.max() / (127 if signed else 255))
        np.testing.assert_array_equal(file["grade"][0], [2, 1])
        assert (file["scan"][0], file["level"][0]) == (b"p1-t2", LEVEL.encode())
        assert json.loads(file.attrs["method"])["signed"] is signed
        np.testing.assert_array_equal(file["affine"][0], hotspot_files.window_affine(data.affine[0]))


def test_a_scan_name_with_a_path_is_refused(maps, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    disc = a_disc(np.random.default_rng(0), "p1", LEVEL, "test", scan="../p1")
    write_manifest(folder, [write_shard(folder / "discs-00000-of-00001.h5", [disc], TASKS)], TASKS, {}, ())
    with pytest.raises(SpinejaxError, match=r"scan '\.\./p1' cannot be part of a file name"):
        hotspot_files.write_nifti(tmp_path / "out", DataSet(folder), 0, TASKS, maps[0])
