"""Corners of fractured, collapsed and degenerate bodies, against the corners that were drawn."""

import numpy as np
import pytest

from data_prep.anatomy.vertebrae import bodies_from_spider_mask
from data_prep.read.scan import Scan
from tests.block_spine import BODY_MM, DEPTH_MM, block_spine

GRIDS = [(0.0, (0.7, 0.7, 4.0)), (12.0, (0.7, 0.7, 4.0)), (-20.0, (0.5, 0.9, 3.3))]


def spoiled(shape, size_mm, tilt_deg, spacing_mm):
    """The mask of a block spine whose L3 is cut to a shape, and the true corners of all bodies.

    `shape(height, depth, size_mm)`, in mm from the upper anterior corner, gives how far the upper endplate and the
    lower one are sunk at each depth, where spurs are, and how far the four true corners are.
    """
    spine = block_spine(tilt_deg=tilt_deg, spacing_mm=spacing_mm, num_bodies=5)
    corners, spacing = spine.corners["L3"], spine.mask.spacing_mm[:2]
    back = (corners[1] - corners[0]) * spacing / DEPTH_MM
    down = (corners[3] - corners[0]) * spacing / BODY_MM
    place = (np.stack(np.indices(spine.mask.voxels.shape[:2]), -1) - corners[0]) * spacing
    height, depth = place @ down, place @ back
    upper, lower, spurs, lost = shape(height, depth, size_mm)
    plane = spine.mask.voxels[:, :, spine.mask.voxels.shape[2] // 2].copy()
    body = (plane == 3) & (depth >= -1) & (depth <= DEPTH_MM + 1)
    plane[body & (height < upper)] = 204  # the disc above fills it
    plane[body & (height > BODY_MM - lower)] = 203
    plane[spurs] = 3
    inside = spine.mask.voxels.any((0, 1))
    mask = Scan(np.where(inside, plane[:, :, None], 0).astype(np.uint8), spine.mask.affine, "mask")
    truth = corners + np.outer(np.multiply(lost, (1, 1, -1, -1)), down) / spacing
    return mask, spine.corners | {"L3": truth}


def bump(depth):
    return np.sin(np.pi * (depth / DEPTH_MM).clip(0, 1))


NO_LOSS = (0, 0, 0, 0)


def biconcave(height, depth, size):
    return size * bump(depth), size * bump(depth), height < -np.inf, NO_LOSS


def upper_sunk(height, depth, size):
    return size * bump(depth), 0, height < -np.inf, NO_LOSS


def front_sunk(height, depth, size):
    return size * bump(DEPTH_MM * (depth / DEPTH_MM).clip(0, 1) ** 0.6), 0, height < -np.inf, NO_LOSS


def v_shaped(height, depth, size):
    sunk = size * (1 - abs(2 * depth / DEPTH_MM - 1)).clip(0)
    return sunk, sunk, height < -np.inf, NO_LOSS


def dented_in_front(height, depth, size):
    return size * np.exp(-(((depth / DEPTH_MM - 0.3) / 0.15) ** 2)), 0, height < -np.inf, NO_LOSS


def wide_node(height, depth, size):
    return size * (abs(depth - 0.45 * DEPTH_MM) < 9), 0, height < -np.inf, NO_LOSS


def node(height, depth, size):
    return size * (abs(depth - 0.5 * DEPTH_MM) < 5), 0, height < -np.inf, NO_LOSS


def wedge(height, depth, size):
    return size * (1 - depth / DEPTH_MM), 0, height < -np.inf, (size, 0, 0, 0)


def wedge_both(height, depth, size):
    lost = size / 2 * (1 - depth / DEPTH_MM)
    return lost, lost, height < -np.inf, (size / 2, 0, 0, size / 2)


def rear_wedge(height, depth, size):
    return size * depth / DEPTH_MM, 0, height < -np.inf, (0, size, 0, 0)


def crush(height, depth, size):
    return size + 0 * depth, 0, height < -np.inf, (size, size, 0, 0)


def spurs_in_front(height, depth, size):
    ends = ((height >= 0) & (height < 4)) | ((height > BODY_MM - 4) & (height <= BODY_MM))
    return 0, 0, ends & (depth < 0) & (depth > -size), NO_LOSS


def spurs_on_top(height, depth, size):
    ends = ((depth >= 0) & (depth < 4)) | ((depth > DEPTH_MM - 4) & (depth <= DEPTH_MM))
    return 0, 0, ends & (height < 0) & (height > -size), NO_LOSS


def errors_mm(mask, truth):
    bodies, notes = bodies_from_spider_mask(mask)
    spacing = mask.spacing_mm[:2]
    apart = {body.name: np.linalg.norm((body.corners - truth[body.name]) * spacing, axis=1) for body in bodies}
    return {name: np.nanmax(apart[name]) for name in apart}, notes


@pytest.mark.parametrize(("tilt_deg", "spacing_mm"), GRIDS)
@pytest.mark.parametrize(
    ("shape", "size_mm", "noted"),
    [
        (biconcave, 4, "the middle"),
        (biconcave, 7, "the middle"),
        (biconcave, 9, "the middle"),
        (biconcave, 11, "the middle"),
        (upper_sunk, 6, "the middle"),
        (upper_sunk, 9, "the middle"),
        (wide_node, 5, "the middle"),
        (wide_node, 8, "the middle"),
        (node, 4, "a part"),
        (node, 12, "a part"),
        (wedge, 5, ""),
        (wedge, 14, ""),
        (wedge, 18, ""),
        (wedge, 22, ""),
        (wedge_both, 12, ""),
        (wedge_both, 22, ""),
        (rear_wedge, 18, ""),
        (crush, 12, ""),
        (crush, 20, ""),
        (spurs_in_front, 8, ""),
        (spurs_in_front, 12, ""),
        (spurs_on_top, 2, ""),
        (spurs_on_top, 4, "the middle"),
    ],
)
def test_corners_are_those_of_the_rims(shape, size_mm, noted, tilt_deg, spacing_mm):
    found, notes = errors_mm(*spoiled(shape, size_mm, tilt_deg, spacing_mm))
    assert found["L3"] < 1.5
    assert max(error for name, error in found.items() if name not in ("L3", "S1")) < 1.0
    assert {note.partition(" of its ")[0] for note in notes} == ({f"mask: L3 is doubtful: {noted}"} if noted else set())


@pytest.mark.parametrize(("tilt_deg", "spacing_mm"), GRIDS)
@pytest.mark.parametrize(("shape", "size_mm"), [(upper_sunk, 4), (front_sunk, 4), (front_sunk, 7)])
def test_an_endplate_whose_rims_are_not_clear_is_noted(shape, size_mm, tilt_deg, spacing_mm):
    _, notes = errors_mm(*spoiled(shape, size_mm, tilt_deg, spacing_mm))
    assert any("L3 is doubtful: the middle of its upper endplate is" in note for note in notes)


@pytest.mark.parametrize(("tilt_deg", "spacing_mm"), GRIDS)
@pytest.mark.parametrize(("shape", "size_mm"), [(v_shaped, 4), (dented_in_front, 4), (dented_in_front, 8)])
def test_a_dent_that_moves_the_corners_is_noted(shape, size_mm, tilt_deg, spacing_mm):
    _, notes = errors_mm(*spoiled(shape, size_mm, tilt_deg, spacing_mm))
    assert any("L3 is doubtful: " in note and "of its upper endplate is" in note for note in notes)


@pytest.mark.parametrize(("tilt_deg", "spacing_mm"), GRIDS)
def test_a_wedge_without_a_front_wall_is_left_out_by_name(tilt_deg, spacing_mm):
    _, notes = errors_mm(*spoiled(wedge, BODY_MM - 0.5, tilt_deg, spacing_mm))
    assert any("L3 was left out: " in note for note in notes)


def test_a_topmost_wedge_that_is_fitted_as_a_cut_body_is_noted():
    spine = block_spine(tilt_deg=12.0, spacing_mm=(0.8, 0.7, 4.0), num_bodies=4)
    corners, spacing = spine.corners["L2"], spine.mask.spacing_mm[:2]
    back, down = (corners[1] - corners[0]) * spacing / DEPTH_MM, (corners[3] - corners[0]) * spacing / BODY_MM
    place = (np.stack(np.indices(spine.mask.voxels.shape[:2]), -1) - corners[0]) * spacing
    lost = place @ down < 23 * (1 - place @ back / DEPTH_MM)
    voxels = np.where((spine.mask.voxels == 4) & lost[:, :, None], 0, spine.mask.voxels)
    _, notes = bodies_from_spider_mask(Scan(voxels, spine.mask.affine, "mask"))
    assert any(note.startswith("mask: L2 is doubtful: only its lower edge is known") for note in notes)
    assert bodies_from_spider_mask(spine.mask)[1] == []
