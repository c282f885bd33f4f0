import json
import re
from pathlib import Path

import numpy as np
import pytest

from data_prep.anatomy.corner_file import bodies_from_corners, read_corners
from data_prep.read.scan import Scan
from spinejax.errors import SpinejaxError
from tests.block_spine import block_spine, sagittal_affine

POINTS = [[0, -40, 60], [0, -5, 60], [0, -5, 34], [0, -40, 34]]


def write(path, bodies):
    path.write_text(json.dumps({"scans": {"s": bodies}}))
    return path


def test_points_of_the_patient_become_voxels_of_the_scan(tmp_path):
    spine = block_spine(angles_deg=(9.0, -6.0), num_slices=13)
    bodies = {}
    for name, corners in spine.corners.items():
        points = (np.c_[corners, np.full(4, 6.0), np.ones(4)] @ spine.scan.affine.T)[:, :3].tolist()
        bodies[name] = {"corners_mm": [*points[:2], None, None] if name == "S1" else points, "width_mm": 40}
    found = bodies_from_corners(spine.scan, read_corners(write(tmp_path / "c.json", bodies))["s"])
    assert [body.name for body in found] == ["L2", "L3", "L4", "L5", "S1"]
    for body in found:
        expected = spine.corners[body.name].copy()
        expected[2:] = np.nan if body.name == "S1" else expected[2:]
        np.testing.assert_allclose(body.corners, expected, atol=1e-6)
        assert body.slices == (1, 12)
        assert body.mid_slice == 6


def test_a_body_between_two_thick_slices_has_the_nearest():
    scan = Scan(np.zeros((80, 80, 3), np.float32), sagittal_affine((1, 1, 60)), "scan")
    points = [(scan.affine @ [*corner, 1.2, 1])[:3].tolist() for corner in ((9, 9), (9, 40), (30, 40), (30, 9))]
    body = {"corners_mm": points, "width_mm": 5}
    assert bodies_from_corners(scan, {"L4": body, "L5": body})[0].slices == (1, 2)


@pytest.mark.parametrize(
    ("bodies", "message"),
    [
        ({"L7": {"corners_mm": POINTS}}, "s, L7: Input should be 'S1', 'L5'"),
        ({"L4": {"corners_mm": POINTS[:3]}}, "s, L4: corners_mm.3: Field required"),
        ({"L4": {"corners_mm": [[0, 0]] * 4}}, "s, L4: corners_mm.0.2: Field required"),
        ({"L4": {"corners_mm": [[0, 0, float("nan")]] * 4}}, "corners_mm.0.2: Input should be a finite number"),
        ({"L4": {"corners_mm": [[0, 0, 2001]] * 4}}, "corners_mm.0.2: Input should be less than or equal to 2000"),
        ({"L4": {"corners_mm": [[0, 0, "1"]] * 4}}, "corners_mm.0.2: Input should be a valid number"),
        ({"L4": {"corners_mm": [None] * 4}}, "neither its upper nor its lower corners are known"),
        ({"L4": {"corners_mm": POINTS, "width_mm": 300}}, "width_mm: Input should be less than or equal to 100"),
        ({"L4": {"corners": POINTS}}, "s, L4: corners_mm: Field required"),
        ({"L4": POINTS}, "s, L4: Input should be"),
        ([], "s: Input should be"),
    ],
)
def test_faults_are_named(tmp_path, bodies, message):
    with pytest.raises(SpinejaxError, match=message):
        read_corners(write(tmp_path / "c.json", bodies))


def test_all_faults_are_reported_at_once(tmp_path):
    bodies = {"L7": {"corners_mm": POINTS}, "L4": {"corners_mm": []}}
    with pytest.raises(SpinejaxError, match="2 faults"):
        read_corners(write(tmp_path / "c.json", bodies))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"scans": 1}', "[" * 100000, '{"L4": {}}'])
def test_other_files_are_refused(tmp_path, text):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(SpinejaxError, match=r"--corners .*c\.json: "):
        read_corners(tmp_path / "c.json")


def test_corners_beside_the_scan_and_too_few_are_refused():
    scan = Scan(np.zeros((80, 80, 3), np.float32), sagittal_affine((1, 1, 4)), "scan")
    body = {"corners_mm": [[500, y, z] for _, y, z in POINTS]}
    with pytest.raises(SpinejaxError, match="scan: L4's corners are outside the slices"):
        bodies_from_corners(scan, {"L4": body, "L5": body})
    with pytest.raises(SpinejaxError, match="the corner file has 1 of its vertebrae"):
        bodies_from_corners(scan, {"L4": body})


def corners_of(spine, turn=lambda points: points):
    """The spine as the part of a corner file, its points turned somehow."""
    bodies = {}
    for name, corners in spine.corners.items():
        points = (np.c_[corners, np.full(4, 6.0), np.ones(4)] @ spine.scan.affine.T)[:, :3]
        bodies[name] = {"corners_mm": turn(points).tolist()}
    return bodies


SPINE = block_spine(angles_deg=(9.0, -6.0))
BACK = (-1, -1, 1)


def test_a_file_in_ras_that_says_so_is_converted(tmp_path):
    path = write(tmp_path / "c.json", corners_of(SPINE, lambda points: points * BACK))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"coordinateSystem": "RAS"}))
    for body in bodies_from_corners(SPINE.scan, read_corners(path)["s"]):
        np.testing.assert_allclose(body.corners, SPINE.corners[body.name], atol=1e-6)


def test_a_file_in_ras_keeps_the_corners_that_are_not_known(tmp_path):
    path = tmp_path / "c.json"
    marked = {"L5": {"corners_mm": [[1, 2, 3], [1, -9, 3], None, None]}}
    path.write_text(json.dumps({"coordinateSystem": "RAS", "scans": {"s": marked}}))
    assert read_corners(path)["s"]["L5"]["corners_mm"] == ((-1, -2, 3), (-1, 9, 3), None, None)


@pytest.mark.parametrize("centred", [False, True], ids=["beside the scan", "about the isocentre"])
def test_a_file_in_ras_that_does_not_say_so_is_refused_by_that_word(centred):
    """3D Slicer's other setting: beside the scan, or within it and mirrored."""
    affine = SPINE.scan.affine.copy()
    if centred:
        affine[:3, 3] -= affine[:3, :3] @ ((np.array(SPINE.scan.voxels.shape) - 1) / 2) + affine[:3, 3]
    scan = Scan(SPINE.scan.voxels, affine, "scan")
    bodies = {}
    for name, corners in SPINE.corners.items():
        points = (np.c_[corners, np.full(4, 6.0), np.ones(4)] @ affine.T)[:, :3]
        bodies[name] = {"corners_mm": (points * BACK).tolist()}
    with pytest.raises(
        SpinejaxError, match=r'scan: .*They fit in RAS: export them in LPS, or write "coordinateSystem"'
    ):
        bodies_from_corners(scan, bodies)


def test_a_file_in_lps_that_claims_to_be_in_ras_is_refused(tmp_path):
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"coordinateSystem": "RAS", "scans": {"s": corners_of(SPINE)}}))
    with pytest.raises(SpinejaxError, match="If it says so, leave that out"):
        bodies_from_corners(SPINE.scan, read_corners(path)["s"])


@pytest.mark.parametrize(
    ("order", "given"),
    [
        ([1, 0, 3, 2], "upper posterior, upper anterior, lower anterior, lower posterior"),
        ([0, 1, 3, 2], "upper anterior, upper posterior, lower anterior, lower posterior"),
        ([3, 2, 1, 0], "lower anterior, lower posterior, upper posterior, upper anterior"),
        ([1, 2, 3, 0], "upper posterior, lower posterior, lower anterior, upper anterior"),
    ],
)
def test_another_order_of_the_corners_is_named(order, given):
    bodies = corners_of(SPINE, lambda points: points[order])
    with pytest.raises(
        SpinejaxError, match=rf"corners are not in the order upper anterior, .*They fit in the order {given}"
    ):
        bodies_from_corners(SPINE.scan, bodies)


def test_voxel_indices_are_named():
    bodies = {}
    for name, corners in SPINE.corners.items():  # column, row, slice, as a viewer prints them
        bodies[name] = {"corners_mm": np.c_[corners[:, ::-1], np.full(4, 6.0)].tolist()}
    with pytest.raises(SpinejaxError, match="They look like voxel indices; expected points in LPS, in mm"):
        bodies_from_corners(SPINE.scan, bodies)


def test_one_body_with_swapped_corners_and_names_upside_down_are_refused():
    bodies = corners_of(SPINE)
    swapped = bodies | {"L3": {"corners_mm": [bodies["L3"]["corners_mm"][place] for place in (1, 0, 3, 2)]}}
    with pytest.raises(SpinejaxError, match="L3's corners are not in the order upper anterior"):
        bodies_from_corners(SPINE.scan, swapped)
    turned = dict(zip(bodies, reversed(bodies.values()), strict=True))
    with pytest.raises(SpinejaxError, match="L2 is below L3: vertebrae are named from the sacrum up"):
        bodies_from_corners(SPINE.scan, turned)


def test_a_name_that_occurs_twice_is_refused(tmp_path):
    body = '{"corners_mm": [[0, 0, 1], [0, 1, 1], [0, 1, 0], [0, 0, 0]]}'
    for names in (("Mu\u0308ller", "M\u00fcller"), ("a", "a")):
        scans = ", ".join(f'"{name}": {{"L4": {body}}}' for name in names)
        (tmp_path / "corners.json").write_text(f'{{"scans": {{{scans}}}}}', encoding="utf-8")
        with pytest.raises(SpinejaxError, match="occurs 2 times"):
            read_corners(tmp_path / "corners.json")


def test_a_byte_order_mark_is_ignored(tmp_path):
    body = {"corners_mm": [[0, 0, 1], [0, 1, 1], [0, 1, 0], [0, 0, 0]]}
    (tmp_path / "corners.json").write_text(json.dumps({"scans": {"a": {"L4": body}}}), encoding="utf-8-sig")
    assert set(read_corners(tmp_path / "corners.json")) == {"a"}


def test_a_markups_file_of_3d_slicer_is_refused_by_that_name(tmp_path):
    """Slicer pull request 4938: control points with labels, and the coordinate system beside them."""
    markups = {
        "type": "Fiducial",
        "coordinateSystem": "RAS",
        "controlPoints": [{"label": "F-1", "position": [0, 0, 0]}],
    }
    (tmp_path / "F.mrk.json").write_text(json.dumps({"@schema": "markups-schema.json#", "markups": [markups]}))
    with pytest.raises(SpinejaxError, match="a markups file of 3D Slicer, which does not say whose corners"):
        read_corners(tmp_path / "F.mrk.json")


def test_the_example_in_the_docs_is_a_corner_file(tmp_path):
    docs = (Path(__file__).parents[3] / "docs" / "data.md").read_text()
    example = re.search(r"```json\n(\{\"scans\".*?)```", docs, re.DOTALL)
    (tmp_path / "c.json").write_text(example[1])
    assert read_corners(tmp_path / "c.json")
