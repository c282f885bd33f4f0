"""What the view of a spine is given: short names, the place of each disc in its scan, and pictures to be trusted."""

import json

import numpy as np
import pytest

from data_prep.anatomy.discs import window_in_scan
from data_prep.dataset.folds import write_fold
from spinejax.data.dataset import DataSet
from spinejax.data.scan_picture import FOLDER, check_scan_pictures, read_scan_picture
from spinejax.errors import SpinejaxError
from spinejax.report.spine import place_of, short_names
from spinejax.tasks import Task
from tests.report.spine_set import SPINE, write_spines
from tests.report.test_page import embedded, write


def test_scans_are_counted_within_their_patients():
    names = short_names(["b", "b", "a", "b", "a"], ["x", "x", "y", "z", "y"])
    assert names == {"x": "Patient 1, scan 1", "z": "Patient 1, scan 2", "y": "Patient 2"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return DataSet(write_spines(tmp_path_factory.mktemp("spines") / "set"))


def test_a_disc_lies_in_the_picture_where_it_was_cut_out(data):
    picture = read_scan_picture(data, "p0-t2")
    for row, level in enumerate(data.level):
        place = place_of(picture, data.affine[row], str(level))
        a, b, c, d, e, f = place["plane"]
        for corner, (y, x) in zip(
            window_in_scan(SPINE.scan, data.affine[row]), [(-0.5, -0.5), (-0.5, 223.5), (111.5, 223.5), (111.5, -0.5)],
            strict=True,
        ):  # fmt: skip
            np.testing.assert_allclose([b * x + d * y + f, a * x + c * y + e], corner, atol=0.01)
        scale, offset = place["slot"]
        in_scan = np.linalg.inv(SPINE.scan.affine) @ data.affine[row] @ [0, 0, 3 + 4, 1]  # the middle slot
        assert scale * in_scan[2] + offset == pytest.approx(4, abs=1e-3)


def test_the_box_holds_the_disc_and_little_of_its_bodies(data):
    picture = read_scan_picture(data, "p0-t2")
    [row] = np.flatnonzero(data.level == "L3-L4")
    place = place_of(picture, data.affine[row], "L3-L4")
    pixel_mm = np.linalg.norm(data.affine[row][:3, 0])
    top, bottom, left, right = place["box"]
    assert 9 <= (bottom - top) * pixel_mm <= 16  # the block spine's discs are 9 mm high
    assert 34 <= (right - left) * pixel_mm <= 40  # and 34 mm deep
    assert place_of(picture | {"bodies": []}, data.affine[row], "L3-L4")["box"] == [35.5, 75.5, 48.5, 174.5]


def test_the_page_of_a_scan_has_its_slices_and_no_more_than_six_megabytes(data, tmp_path):
    path, _ = write(tmp_path, data)
    text = path.read_text()
    facts = json.loads(embedded(text, "facts"))
    [scan] = facts["scans"]
    assert scan["name"] == "Patient 1"
    assert [facts["discs"][place]["level"] for place in scan["discs"]] == ["L2-L3", "L3-L4", "L4-L5", "L5-S1"]
    assert {f'id="scan-0-{number}"' in text for number in range(scan["picture"]["slices"])} == {True}
    assert len(text) < 6e6


def test_without_pictures_the_page_says_that_it_shows_discs_only(tmp_path):
    scans = [("p0", "p0-t1"), ("p0", "p0-t2")]
    data = DataSet(write_spines(tmp_path / "set", scans=scans, pictured=["p0-t2"]))
    text = write(tmp_path / "out", data)[0].read_text()
    first, second = json.loads(embedded(text, "facts"))["scans"]
    assert first["picture"] is None
    assert second["picture"]["slices"] == 13
    assert [first["name"], second["name"]] == ["Patient 1, scan 1", "Patient 1, scan 2"]
    assert "discs only" in text


@pytest.mark.parametrize("fault", ["byte", "missing", "added"])
def test_pictures_that_are_not_what_was_written_are_refused(tmp_path, fault):
    data = DataSet(write_spines(tmp_path / "set"))
    check_scan_pictures(data)
    path = data.folder / FOLDER / "p0-t2.json"
    if fault == "byte":
        path.write_text(path.read_text().replace("L4", "L5", 1))
    elif fault == "missing":
        path.unlink()
    else:
        path.with_name("other.json").write_text("{}")
    with pytest.raises(SpinejaxError, match=rf"set/{FOLDER}: {FOLDER}/(p0-t2|other).json .*delete this folder"):
        check_scan_pictures(data)


@pytest.mark.parametrize(
    "change",
    [
        {"affine": [[0, 0, 0, float("inf")]] * 4},
        {"slices": ['"></script><script>']},
        {"shape": [0, 5]},
        {"bodies": [{"name": "L4"}]},
    ],
)
def test_a_picture_of_another_form_is_refused(tmp_path, change):
    other = DataSet(write_spines(tmp_path / "set"))
    path = other.folder / FOLDER / "p0-t2.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(SpinejaxError, match=r"p0-t2\.json: damaged"):
        read_scan_picture(other, "p0-t2")


def test_a_fold_has_the_pictures_of_its_original(tmp_path):
    scans = [(f"p{number}", f"p{number}-t2") for number in range(4)]
    folder = write_spines(tmp_path / "set", scans=scans)
    write_fold(DataSet(folder), tmp_path / "fold", "1/2", seed=0)
    fold = DataSet(tmp_path / "fold")
    check_scan_pictures(fold)
    assert read_scan_picture(fold, "p3-t2") == read_scan_picture(DataSet(folder), "p3-t2")


def test_words_of_a_data_set_stay_text(tmp_path):
    odd = (Task("side", ("</script><b>x", 'b"<i>')), Task("other", ("=1+1", "c")))
    text = write(tmp_path / "out", DataSet(write_spines(tmp_path / "set", tasks=odd)), tasks=odd)[0].read_text()
    assert "<b>x" not in text
    assert "<i>" not in text
