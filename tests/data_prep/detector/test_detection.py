"""The shipped weights on whole phantoms: good scans, and bad ones, which must be refused or flagged."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from data_prep.__main__ import main
from data_prep.anatomy.vertebrae import bodies_from_spider_mask
from data_prep.detector import detect as detecting
from data_prep.detector import weights
from data_prep.detector.detect import detect
from data_prep.phantom.phantom import phantom
from data_prep.read.metaimage import write_mha
from data_prep.read.scan import Scan
from spinejax.data.dataset import DataSet
from spinejax.errors import SpinejaxError
from spinejax.geometry import INTENSITY_ONE

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def drawn():
    """Phantoms of a seed that never trained."""
    return [phantom(3, patient) for patient in range(2)]


def truly(found, one):
    """Whether each body that was found is where the phantom has the one of that name."""
    true = {name: corners.mean(0) for name, corners in one.bodies.items()}
    return [
        np.linalg.norm((np.nanmean(body.corners, axis=0) - true[body.name]) * one.scan.spacing_mm[:2]) < 13
        for body in found.bodies
        if body.name in true and body.name != "S1"
    ]


def never_sure_and_wrong(scan, one):
    """The rule for bad input: refused, or flagged, or right."""
    try:
        found = detect(scan)
    except SpinejaxError:
        return True
    return bool(found.notes) or all(truly(found, one))


def test_the_shipped_weights_are_small_whole_and_attributed():
    assert weights.load()
    assert weights.SHIPPED.stat().st_size < 8 << 20
    assert "CC BY 4.0" in (weights.SHIPPED.parent / "ATTRIBUTION.md").read_text()


def test_phantoms_are_found_and_named(drawn):
    for one in drawn:
        found = detect(one.scan)
        right = truly(found, one)
        assert len(right) >= 5
        assert all(right) or found.notes


def test_the_second_look_brings_corners_nearer_to_those_of_the_mask(drawn, monkeypatch):
    def errors_mm():
        errors = []
        for one in drawn:
            true = {body.name: body.corners for body in bodies_from_spider_mask(one.mask)[0]}
            for body in detect(one.scan).bodies:
                if body.name in true and body.name != "S1":
                    errors.append(np.linalg.norm((body.corners - true[body.name]) * one.scan.spacing_mm[:2], axis=1))
        return np.array(errors)

    with_it = errors_mm()
    monkeypatch.setattr(detecting, "second_look", lambda members, scan, column: column)
    without_it = errors_mm()
    assert len(with_it) == len(without_it) > 10
    assert np.nanmedian(with_it) < min(0.8, 0.9 * np.nanmedian(without_it))


def test_one_slice_is_enough(drawn):
    one = drawn[0]
    middle = round(one.mid_slice["L3"])
    affine = one.scan.affine.copy()
    affine[:3, 3] = (one.scan.affine @ (0, 0, middle, 1))[:3]
    single = Scan(one.scan.voxels[:, :, middle : middle + 1], affine, "single")
    found = detect(single)
    assert len(truly(found, one)) >= 4
    assert all(body.slices == (0, 1) for body in found.bodies)


def test_noise_and_emptiness_are_refused_or_flagged():
    voxels = np.random.default_rng(0).random((256, 256, 7), np.float32)
    for content in (voxels, np.zeros_like(voxels)):
        try:
            found = detect(Scan(content, phantom_affine(), "no spine"))
        except SpinejaxError:
            continue
        assert found.notes
        assert max(found.confidence.values()) < 0.5


def phantom_affine():
    affine = np.eye(4)
    affine[:3, :3] = np.array([[0, 0, 4.0], [0, 1.0, 0], [-1.0, 0, 0]])
    return affine


@pytest.mark.parametrize("harm", ["upside down", "back to front", "three vertebrae", "cervical", "metal"])
def test_bad_scans_are_refused_flagged_or_right(drawn, harm):
    one = drawn[0]
    voxels, affine = one.scan.voxels.copy(), one.scan.affine.copy()
    if harm == "upside down":
        voxels = voxels[::-1]
    elif harm == "back to front":
        voxels = voxels[:, ::-1]
    elif harm == "three vertebrae":
        voxels = voxels[: int(one.bodies["L2"][2, 0])].copy()
    elif harm == "cervical":  # bodies of half the size, and no sacrum
        voxels = voxels[: int(one.bodies["L5"][2, 0])].copy()
        affine[:3, :2] /= 2
    elif harm == "metal":
        rows, columns = np.mgrid[: voxels.shape[0], : voxels.shape[1]]
        centre = one.bodies["L5"].mean(0)
        void = np.hypot(rows - centre[0], columns - centre[1]) * one.scan.spacing_mm[0] < 25
        voxels[void] = 0
    scan = Scan(np.ascontiguousarray(voxels), affine, harm)
    if harm in ("upside down", "back to front"):  # no place is right there
        one = replace(one, bodies={name: corners - 1e4 for name, corners in one.bodies.items()})
    assert never_sure_and_wrong(scan, one)


def test_scans_without_masks_become_discs(drawn, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    write_mha(tmp_path / "images" / "a_t2.mha", drawn[0].scan)
    assert main(["scans", str(tmp_path / "images"), "--out", str(tmp_path / "out")]) == 0
    data = DataSet(tmp_path / "out")
    assert len(data) >= 5
    window = data.volume(0)[40:152, 48:272, 7]
    assert np.median(window) < INTENSITY_ONE
    assert main(["overlay", str(tmp_path / "images"), "--out", str(tmp_path / "sheet.png")]) == 0
    assert "1: a_t2.mha" in capsys.readouterr().out


def test_detect_eval_measures_against_masks_and_names_no_scan(tmp_path, capsys):
    assert main(["phantom", "--as", "scans", "--patients", "2", "--out", str(tmp_path / "made")]) == 0
    [*names] = sorted(path.name for path in (tmp_path / "made" / "images").iterdir())
    command = ["detect-eval", str(tmp_path / "made" / "images"), "--masks", str(tmp_path / "made" / "masks")]
    assert main([*command, "--out", str(tmp_path / "figures.json")]) == 0
    text = (tmp_path / "figures.json").read_text()
    assert json.loads(text)["summary"]["n_scans"] == 2
    assert json.loads(text)["summary"]["bodies_found"]["value"] > 0.5
    assert not any(name in text for name in names)

    shutil.copy(weights.SHIPPED, tmp_path / "some.npz")
    shutil.copy(weights.SHIPPED.with_suffix(".json"), tmp_path / "some.json")
    chosen = ["--weights", str(tmp_path / "some.npz")]
    assert main([*command, *chosen, "--out", str(tmp_path / "some.json")]) == 2
    assert "belongs to the weights" in capsys.readouterr().err
    (tmp_path / "some.json").unlink()
    assert main([*command, *chosen, "--out", str(tmp_path / "other.json")]) == 2
    assert "weights or their .json cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "other.json").exists()
