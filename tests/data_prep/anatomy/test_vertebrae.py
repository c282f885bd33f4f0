import dataclasses

import numpy as np
import pytest

from data_prep.anatomy.vertebrae import bodies_from_spider_mask, body_labels
from data_prep.read.scan import Scan
from spinejax.errors import SpinejaxError
from tests.block_spine import BODY_MM, DEPTH_MM, block_spine


def errors_mm(spine, bodies):
    """Distance of each found corner from its true place; NaN where the corner is not known."""
    spacing = spine.mask.spacing_mm[:2]
    return {body.name: np.linalg.norm((body.corners - spine.corners[body.name]) * spacing, axis=1) for body in bodies}


def changed(spine, change):
    """The mask after `change(voxels)`."""
    voxels = spine.mask.voxels.copy()
    change(voxels)
    return Scan(voxels, spine.mask.affine, spine.mask.name)


@pytest.mark.parametrize("tilt_deg", [-25, 0, 12, 40])
@pytest.mark.parametrize("spacing_mm", [(0.8, 0.8, 4.0), (0.5, 0.9, 3.3), (1.1, 0.6, 5.0)])
def test_corners_of_blocks_are_found(tilt_deg, spacing_mm):
    spine = block_spine(tilt_deg=tilt_deg, spacing_mm=spacing_mm)
    bodies, notes = bodies_from_spider_mask(spine.mask)
    assert [body.name for body in bodies] == ["L2", "L3", "L4", "L5", "S1"]
    assert notes == []
    for name, error in errors_mm(spine, bodies).items():
        assert (np.isfinite(error) == ([True] * 2 + [name != "S1"] * 2)).all(), name
        assert np.nanmax(error) < 1.0, (name, error)


def test_slices_are_those_that_the_body_fills():
    bodies, _ = bodies_from_spider_mask(block_spine(num_slices=13).mask)
    assert {body.slices for body in bodies} == {(1, 12)}
    assert bodies[0].mid_slice == 6


def test_one_slice_is_enough():
    bodies, _ = bodies_from_spider_mask(block_spine(num_slices=1).mask)
    assert {body.slices for body in bodies} == {(0, 1)}


def test_osteophytes_and_schmorl_nodes_move_corners_little():
    spine = block_spine(tilt_deg=0, spacing_mm=(0.5, 0.5, 4.0))
    top_left = np.round(spine.corners["L3"][0]).astype(int)
    bottom_right = np.round(spine.corners["L3"][2]).astype(int)

    def spoil(voxels):
        row, column = top_left
        voxels[row : row + 8, column - 12 : column] = 3  # a spur, 6 mm forward and 4 mm high
        voxels[row : row + 10, column + 25 : column + 41] = 204  # a node, 5 mm deep and 8 mm wide
        row, column = bottom_right
        voxels[row - 5 : row, column : column + 6] = 3  # a spur at the back

    bodies, _ = bodies_from_spider_mask(changed(spine, spoil))
    assert np.nanmax(errors_mm(spine, bodies)["L3"]) < 1.0


def test_wedge_fracture_keeps_its_own_corners():
    spine = block_spine(tilt_deg=0, spacing_mm=(0.5, 0.5, 4.0))
    upper_anterior, upper_posterior = spine.corners["L3"][:2]

    def crush(voxels):
        rows, columns = np.mgrid[: voxels.shape[0], : voxels.shape[1]]
        front = (upper_posterior[1] - columns) / (upper_posterior[1] - upper_anterior[1])
        crushed = rows < upper_anterior[0] + 20 * front  # the front wall loses 10 of 26 mm
        voxels[crushed[:, :, None] & (voxels == 3)] = 0

    bodies, notes = bodies_from_spider_mask(changed(spine, crush))
    assert notes == []
    spine.corners["L3"][0, 0] += 20
    assert np.nanmax(errors_mm(spine, bodies)["L3"]) < 1.0


def test_a_body_that_slips_forward_keeps_its_own_corners():
    """Listhesis: L4, all of it, 12 mm in front of L5."""
    spine = block_spine(tilt_deg=0, spacing_mm=(0.5, 0.5, 4.0))

    def slip(voxels):
        above = voxels[: int(spine.corners["L5"][0, 0]) - 2]
        above[:, :-24] = above[:, 24:].copy()

    bodies, _ = bodies_from_spider_mask(changed(spine, slip))
    for name in ("L2", "L3", "L4"):
        spine.corners[name][:, 1] -= 24
    for name, error in errors_mm(spine, bodies).items():
        assert np.nanmax(error) < 1.5, (name, error)


def test_bodies_to_the_side_are_found_where_their_own_middle_is():
    """Scoliosis: each vertebra is further to one side than the one below."""
    spine = block_spine(num_slices=25, spacing_mm=(0.8, 0.8, 3.0))

    def bend(voxels):
        straight = voxels.copy()
        for label, shift in ((1, 0), (2, 2), (3, 4), (4, 5)):
            for part in (label, 200 + label):
                voxels[straight == part] = 0
                voxels[np.roll(straight == part, shift, axis=2)] = part

    bodies, _ = bodies_from_spider_mask(changed(spine, bend))
    assert [body.mid_slice for body in bodies] == [17, 16, 14, 12, 12]
    for name, error in errors_mm(spine, bodies).items():
        assert np.nanmax(error) < 1.0, (name, error)


@pytest.mark.parametrize(("mirrored", "side"), [(False, "last"), (True, "first")])
def test_body_that_leaves_the_stack_sideways_is_doubtful(mirrored, side):
    """Scoliosis: of L4, 2 slices are seen, the last; L3 (5 slices, 20 mm) is seen to its middle."""
    spine = block_spine()

    def bend(voxels):
        straight = voxels.copy()
        for label, shift in ((2, 10), (3, 7)):
            voxels[straight == label] = 0
            voxels[:, :, shift:][straight[:, :, :-shift] == label] = label
        if mirrored:
            voxels[:] = voxels[:, :, ::-1].copy()

    bodies, notes = bodies_from_spider_mask(changed(spine, bend))
    assert len(bodies) == 5
    doubt = f"L4 is doubtful: only 8 mm of its width are seen, in the {side} slices, so its middle may be outside"
    assert [doubt in note for note in notes] == [True]


def test_posterior_elements_are_no_part_of_the_body():
    mask = block_spine().mask

    def bridge(voxels):  # pedicles: beside the midline the canal is closed off
        for side in (2, 10):
            voxels[:, :, side][voxels[:, :, side] == 100] = 3

    spine = block_spine()
    labels = body_labels(changed(spine, bridge))
    canal_front = np.argmax(mask.voxels[:, :, 6] == 100, axis=1)
    rows, columns, _ = np.nonzero((labels > 0) & (labels < 26))
    assert (columns < canal_front[rows]).all()
    np.testing.assert_array_equal(labels[mask.voxels > 200], mask.voxels[mask.voxels > 200])


def test_top_body_cut_by_the_image_keeps_its_lower_corners():
    spine = block_spine(tilt_deg=8)
    row = int(spine.corners["L2"][:2, 0].mean() + 12 / spine.mask.spacing_mm[0])
    mask = Scan(spine.mask.voxels[row:], spine.mask.affine, "cut")
    bodies, notes = bodies_from_spider_mask(mask)
    assert notes == []
    assert bodies[0].name == "L2"
    assert np.isnan(bodies[0].corners[:2]).all()
    found = (bodies[0].corners[2:] + np.array((row, 0)) - spine.corners["L2"][2:]) * mask.spacing_mm[:2]
    assert np.linalg.norm(found, axis=1).max() < 2.0


def test_partly_visible_label_gives_lower_corners_only():
    spine = block_spine()
    bodies, _ = bodies_from_spider_mask(changed(spine, lambda voxels: np.putmask(voxels, voxels == 4, 104)))
    assert bodies[0].name == "L2"
    assert np.isnan(bodies[0].corners[:2]).all()
    assert np.nanmax(errors_mm(spine, bodies)["L2"]) < 1.0


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (
            lambda voxels: np.putmask(voxels, voxels == 4, 12),
            "vertebra 12 from the bottom was left out: it is above T9",
        ),
        (
            lambda voxels: voxels[:63].fill(0),
            "L2 was left out: a mask of a few pixels",
        ),  # all but a sliver of the top body is missing
        (
            lambda voxels: np.putmask(voxels[:, :108], voxels[:, :108] == 3, 0),
            "L3 was left out: its endplate is 17 mm long, 34 mm",
        ),
        (
            lambda voxels: np.putmask(voxels[:, :137], voxels[:, :137] == 4, 0),
            "L2 was left out: no part of it is in front of the canal",
        ),
        (
            lambda voxels: np.putmask(voxels[:, 90:], voxels[:, 90:] == 201, 0),
            "S1 was left out: its endplate would be 9.3 mm",
        ),
    ],
)
def test_doubtful_vertebrae_are_left_out_with_a_reason(change, note):
    bodies, notes = bodies_from_spider_mask(changed(block_spine(tilt_deg=0), change))
    assert len(bodies) == 4
    assert len(notes) == 1
    assert note in notes[0]
    assert "left out" in notes[0]


def test_mask_without_canal_is_an_error():
    spine = block_spine()
    with pytest.raises(SpinejaxError, match="block mask: no spinal canal"):
        bodies_from_spider_mask(changed(spine, lambda voxels: np.putmask(voxels, voxels == 100, 0)))


def test_fewer_than_two_bodies_is_an_error():
    spine = block_spine()
    keep_one = changed(spine, lambda voxels: np.putmask(voxels, (voxels != 100) & (voxels != 2), 0))
    with pytest.raises(SpinejaxError, match="1 usable vertebral bodies, expected two or more"):
        bodies_from_spider_mask(keep_one)


def test_left_and_right_flip_changes_nothing_in_plane():
    spine = block_spine(num_slices=12)
    flipped = dataclasses.replace(spine.mask, voxels=np.ascontiguousarray(spine.mask.voxels[:, :, ::-1]))
    for body, other in zip(bodies_from_spider_mask(spine.mask)[0], bodies_from_spider_mask(flipped)[0], strict=True):
        np.testing.assert_allclose(body.corners, other.corners, atol=1e-6)


def test_sizes_are_in_mm():
    spine = block_spine(spacing_mm=(0.5, 0.9, 3.0))
    corners = bodies_from_spider_mask(spine.mask)[0][1].corners * (0.5, 0.9)
    sides = np.linalg.norm(corners - np.roll(corners, -1, axis=0), axis=1)
    np.testing.assert_allclose(sides, [DEPTH_MM, BODY_MM] * 2, atol=1.2)
