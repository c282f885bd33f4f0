"""NiiVue's pages: what is where in their volumes, and nothing of the bundle is changed."""

import base64
import dataclasses
import gzip
import hashlib
import json
import re

import nibabel
import numpy as np
import pytest

from spinejax.data.dataset import DataSet
from spinejax.data.manifest import write_manifest
from spinejax.data.scan_picture import read_scan_picture
from spinejax.data.shards import shard_name, write_shard
from spinejax.geometry import VOLUME_SHAPE, WINDOW_SHAPE, central_window, window_affine
from spinejax.report import niivue
from spinejax.report.niivue import Viewer
from spinejax.tasks import Task
from tests.conftest import TASKS, a_disc
from tests.report.spine_set import write_spines
from tests.report.test_page import made_up

LESION = (60, 150, 4)  # row, column and slice of the window
RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def spots(num_tasks):
    """A spot beside the middle, of the first task alone."""
    maps = np.zeros((num_tasks, *WINDOW_SHAPE), np.float32)
    row, column, slot = LESION
    maps[0, row - 4 : row + 5, column - 4 : column + 5, slot] = -2
    return maps


def pages(folder, data, tasks=TASKS, hotspots=True):
    graded, _ = made_up(data, tasks)
    viewer = Viewer(folder, graded)
    for row in graded.rows if hotspots else ():
        viewer.add(row, spots(len(tasks)))
    viewer.close()
    return graded


class Read:
    """What a page holds."""

    def __init__(self, path):
        self.text = path.read_text()
        found = dict(re.findall(r'<script type="[a-z/]+" id="([^"]+)">(.*?)</script>', self.text, re.DOTALL))
        self.facts = json.loads(found.pop("facts"))
        self.volumes = {
            name.removeprefix("volume-"): nibabel.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(text)))
            for name, text in found.items()
        }

    def at(self, name, mm):
        """The voxel of a volume at a place, RAS, mm."""
        volume = self.volumes[name]
        place = np.rint(np.linalg.inv(volume.affine) @ [*mm, 1])[:3].astype(int)
        return np.asarray(volume.dataobj)[tuple(place)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spines") / "set"
    return DataSet(write_spines(folder, scans=[("p0", "p0-t2"), ("p1", "p1-t2")], pictured=["p0-t2"]))


@pytest.fixture(scope="module")
def made(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("niivue")
    return folder, pages(folder, data)


def test_the_bundle_is_the_one_of_npm():
    assert hashlib.sha256(niivue.bundle().encode()).hexdigest() == niivue.NIIVUE_SHA256
    assert f'"{niivue.NIIVUE_VERSION}"' in niivue.bundle()
    licences = (niivue.BUNDLE.parent / "LICENSES.txt").read_text()
    assert f"@niivue/niivue {niivue.NIIVUE_VERSION}" in licences
    assert "Copyright (c) 2021, Niivue" in licences


def test_the_whole_scan_lies_where_its_picture_says(data, made):
    picture = read_scan_picture(data, "p0-t2")
    scan = Read(made[0] / "scan-001.html").volumes["scan"]
    assert scan.shape == (*picture["shape"], len(picture["slices"]))
    np.testing.assert_allclose(scan.affine, RAS @ picture["affine"], atol=1e-4)
    assert np.asarray(scan.dataobj).max() > 200


@pytest.mark.parametrize("number", [0, 1])
def test_hotspots_discs_and_scan_agree_in_every_disc(data, made, number):
    """Of the scan that has a picture, and of the one whose discs are all there is."""
    page, rows = Read(made[0] / f"scan-{number + 1:03d}.html"), made[1].rows[4 * number : 4 * number + 4]
    assert page.facts["whole"] is (number == 0)
    assert ("each in its place" in page.text) is (number == 1)
    for row in rows:
        to_patient = RAS @ window_affine(data.affine[row])
        spot = (to_patient @ [*LESION, 1])[:3]
        opposite = (to_patient @ [LESION[0], WINDOW_SHAPE[1] - LESION[1], LESION[2], 1])[:3]
        assert page.at("hotspots-brightness", spot) > 200
        assert page.at("hotspots-brightness", opposite) == 0
        assert page.facts["labels"][page.at("masks", spot)] == data.level[row]
        disc = next(disc for disc in page.facts["discs"] if disc["level"] == data.level[row])
        assert page.facts["labels"][page.at("masks", disc["centre"])] == data.level[row]
    assert not np.asarray(page.volumes["hotspots-side"].dataobj).any()


def test_without_a_picture_the_discs_are_the_scan(data, made):
    page, graded = Read(made[0] / "scan-002.html"), made[1]
    for row in graded.rows[4:]:
        window = central_window(data.volume(row)) >> 8
        for place in ((40, 60, 4), (70, 170, 3)):
            around = window[place[0] - 2 : place[0] + 3, place[1] - 2 : place[1] + 3, place[2]]
            if np.ptp(around) < 8:  # not at an edge
                mm = (RAS @ window_affine(data.affine[row]) @ [*place, 1])[:3]
                assert abs(int(page.at("scan", mm)) - int(window[place])) < 8


def test_bodies_are_inside_their_corners(data, made):
    page, picture = Read(made[0] / "scan-001.html"), read_scan_picture(data, "p0-t2")
    known = [body for body in picture["bodies"] if None not in body["corners"]]
    assert len(known) >= 4
    for body in known:
        middle = (*np.mean(body["corners"], axis=0), (body["slices"][0] + body["slices"][1] - 1) // 2)
        mm = (RAS @ picture["affine"] @ [*middle, 1])[:3]
        assert page.facts["labels"][page.at("masks", mm)] == body["name"]


def test_grades_are_those_of_the_network(made):
    page, graded = Read(made[0] / "scan-001.html"), made[1]
    levels = [disc["level"] for disc in page.facts["discs"]]
    assert levels == ["L2-L3", "L3-L4", "L4-L5", "L5-S1"]
    for disc in page.facts["discs"]:
        place = graded.data.level[graded.rows].tolist().index(disc["level"])
        for task, (grade, p) in zip(graded.tasks, disc["grades"], strict=True):
            chances = graded.probabilities[task.name][place]
            assert (grade, p) == (task.grades[chances.argmax()], pytest.approx(chances.max(), abs=1e-3))


def test_a_grade_that_is_not_the_most_probable_one_has_its_own_probability(data, tmp_path):
    graded, _ = made_up(data)
    num = len(graded.rows)
    unsure = {"brightness": np.tile([0.4, 0.3, 0.3], (num, 1)), "side": np.tile([0.8, 0.2], (num, 1))}
    viewer = niivue.Viewer(tmp_path, dataclasses.replace(graded, probabilities=unsure, decide_by="distance"))
    viewer.close()
    disc = Read(tmp_path / "scan-001.html").facts["discs"][0]
    assert disc["grades"] == [["grey", 0.3], ["front", 0.8]]


def test_a_list_leads_to_the_scans_and_earlier_pages_go(data, made, tmp_path):
    (tmp_path / "scan-007.html").touch()
    pages(tmp_path, data, hotspots=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.html", "scan-001.html", "scan-002.html"]
    assert re.findall(r'href="(scan-\d+.html)"[^>]*>([^<]*)', (tmp_path / "index.html").read_text()) == [
        ("scan-001.html", "Patient 1"),
        ("scan-002.html", "Patient 2"),
    ]
    page = Read(tmp_path / "scan-001.html")
    assert set(page.volumes) == {"scan", "masks"}
    assert 'id="hotspots"' not in page.text


def test_one_scan_is_one_page_with_its_lesions(tmp_path):
    lesion = np.zeros(VOLUME_SHAPE, np.uint16)
    lesion[100:104, 140:150, 7] = 2
    disc = a_disc(np.random.default_rng(0), "p0", "L5-S1", "test", lesion=lesion)
    summary = write_shard(tmp_path / shard_name(0, 1), [disc], TASKS, ("lesion",))
    write_manifest(tmp_path, [summary], TASKS, {}, ("lesion",))
    pages(tmp_path / "page", DataSet(tmp_path))
    assert [path.name for path in (tmp_path / "page").iterdir()] == ["index.html"]
    page = Read(tmp_path / "page" / "index.html")
    assert page.at("lesions", (RAS @ disc.affine @ [102, 145, 7, 1])[:3]) == 1
    assert np.asarray(page.volumes["lesions"].dataobj).sum() == (lesion > 0).sum()


def test_names_stay_text(data, tmp_path):
    hostile = (Task("brightness", ("</script><img src=x>", "grey", "bright")), TASKS[1])
    spines = write_spines(tmp_path / "set", tasks=hostile)
    pages(tmp_path / "page", DataSet(spines), hostile)
    text = (tmp_path / "page" / "index.html").read_text()
    assert "<img" not in text
    assert Read(tmp_path / "page" / "index.html").facts


def test_discs_come_in_their_order(data, tmp_path):
    graded, _ = made_up(data)
    with pytest.raises(ValueError, match="is not the next disc"):
        Viewer(tmp_path, graded).add(graded.rows[1], spots(2))
