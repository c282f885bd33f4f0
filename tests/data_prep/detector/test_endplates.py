"""The second look at endplates: where patches lie, what the network answers, how corners move, and what teaches it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from data_prep.detector import endplates
from data_prep.detector.candidates import BODY, SACRUM, Candidate, group
from data_prep.detector.chain import Column
from data_prep.detector.endplates import ENDPLATE_PX, LOWER, UPPER, frame, patch_grid, second_look
from data_prep.detector.network import PATCH_SHAPE, EndplateNet
from data_prep.detector.training.augment import stack
from data_prep.detector.training.endplates import endplate_loss, endplates_of, random_patch
from data_prep.detector.training.truth import BODY as A_BODY
from data_prep.detector.training.truth import DOUBTFUL, MAX_POINTS, Slice
from data_prep.detector.training.truth import SACRUM as THE_SACRUM
from data_prep.read.scan import Scan
from tests.block_spine import sagittal_affine

CORNERS = np.array([[-13.0, -17.0], [-13.0, 17.0], [13.0, 17.0], [13.0, -17.0]])  # of a body 26 mm high, 34 mm deep
SCALE = 34.0 / ENDPLATE_PX


def turned(corners, angle_deg):
    sin, cos = np.sin(np.deg2rad(angle_deg)), np.cos(np.deg2rad(angle_deg))
    return corners @ np.array([[cos, -sin], [sin, cos]]).T


# Patches -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("angle_deg", [0.0, 30.0, -50.0])
def test_a_patch_lies_along_its_endplate_with_the_body_in_its_lower_half(angle_deg):
    corners = turned(CORNERS, angle_deg) + np.array([90.0, 70.0])
    ends = np.stack([corners[list(UPPER)], corners[list(LOWER)]])
    middle, matrix = frame(ends, np.array([1.0, -1.0]))
    np.testing.assert_allclose(middle, ends.mean(1))
    for number in range(2):
        in_patch = (np.concatenate([ends[number], [corners.mean(0)]]) - middle[number]) @ np.linalg.inv(
            matrix[number]
        ).T
        expected = [(0.0, -ENDPLATE_PX / 2), (0.0, ENDPLATE_PX / 2), (13.0 / SCALE, 0.0)]
        np.testing.assert_allclose(in_patch, expected, atol=1e-5)
        assert np.linalg.det(matrix[number]) == pytest.approx(SCALE**2 * (1, -1)[number])  # a lower one is mirrored


def test_a_patch_is_the_same_for_numpy_and_under_vmap_and_jit():
    ends = np.random.default_rng(0).normal(0, 20, (6, 2, 2)).astype(np.float32)
    sides = np.array([1, -1, 1, -1, -1, 1], np.float32)
    for ours, theirs in zip(frame(ends, sides), jax.jit(jax.vmap(frame))(ends, sides), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_grid_of_a_patch_is_about_its_middle():
    grid = patch_grid()
    assert grid.shape == (*PATCH_SHAPE, 2)
    np.testing.assert_allclose(grid.mean((0, 1)), 0, atol=1e-6)
    np.testing.assert_allclose(grid[0, 0], [-(size - 1) / 2 for size in PATCH_SHAPE])


# The network ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network():
    return EndplateNet().init(jax.random.key(0), jnp.zeros((1, *PATCH_SHAPE)), train=False)


def test_brightness_and_contrast_of_a_patch_do_not_count(network):
    patches = jax.random.uniform(jax.random.key(1), (3, *PATCH_SHAPE))
    answers = EndplateNet().apply(network, patches, train=False)
    assert answers.shape == (3, 2, 2)
    assert (abs(answers) <= jnp.array([[[size / 2 for size in PATCH_SHAPE]]])).all()
    np.testing.assert_allclose(EndplateNet().apply(network, 2 * patches + 3, train=False), answers, atol=0.05)
    for number in range(3):  # a patch's answer does not depend on the others
        np.testing.assert_allclose(
            EndplateNet().apply(network, patches[number : number + 1], train=False)[0], answers[number], atol=1e-4
        )


def test_an_answer_is_the_mean_place_of_its_heat(network):
    """With a heat map that is the same everywhere, both ends are in the middle."""
    flat = jax.tree.map(lambda leaf: leaf, network)
    flat["params"]["heat"] = jax.tree.map(jnp.zeros_like, flat["params"]["heat"])
    answers = EndplateNet().apply(flat, jax.random.uniform(jax.random.key(2), (1, *PATCH_SHAPE)), train=False)
    np.testing.assert_allclose(answers, 0, atol=1e-5)


# Corners of a column -------------------------------------------------------------------------------------------------


def column_of(num_slices=5):
    """S1 and two bodies in every slice, in mm."""
    places = [(SACRUM, 150.0), (BODY, 115.0), (BODY, 80.0)]
    seen = [Candidate(kind, 0.9, np.array([row, 60.0]), CORNERS + np.array([row, 60.0])) for kind, row in places]
    groups = sorted(group([seen] * num_slices, range(num_slices)), key=lambda one: -one.centre[0])
    return Column((*groups[:2], None, *groups[2:]), 9.0)


SCAN = Scan(np.random.default_rng(0).random((200, 120, 5)).astype(np.float32), sagittal_affine((1.0, 1.0, 4.0)), "scan")


def test_every_look_moves_an_endplate_to_where_the_networks_see_its_ends_on_average(monkeypatch):
    """Both networks see the ends level with each other, one 3 px further into the body than the other."""

    def ends(variables, patches):
        rows = np.full((len(patches), 2), variables["row"])
        return np.stack([rows, np.broadcast_to([-ENDPLATE_PX / 2, ENDPLATE_PX / 2], rows.shape)], axis=-1)

    monkeypatch.setattr(endplates, "_ends", ends)
    before = column_of()
    after = second_look([{"row": 0.0}, {"row": 3.0}], SCAN, before)
    into = 2 * 1.5 * SCALE  # two looks
    sacrum, lower, none, _ = after.groups
    assert none is None
    np.testing.assert_allclose(lower.corners - before.groups[1].corners, [(into, 0), (into, 0), (-into, 0), (-into, 0)])
    np.testing.assert_allclose(sacrum.corners[:2] - before.groups[0].corners[:2], [(into, 0), (into, 0)])
    np.testing.assert_allclose(sacrum.corners[2:], before.groups[0].corners[2:])  # which have no meaning
    assert lower.members[2].spread_mm == pytest.approx(into)
    assert sacrum.members[2].spread_mm == pytest.approx(into)
    assert lower.central() == [1, 2, 3]
    for index in (0, 4):  # at the flanks corners stay
        assert lower.members[index] is before.groups[1].members[index]
    assert after.score == before.score


def test_patches_are_taken_from_the_candidates_own_slice(monkeypatch):
    """Each slice has its own grey; beyond the end of the image, 13 mm below S1's endplate, a patch is black."""
    seen = []

    def ends(variables, patches):
        seen.append(np.array(patches))
        return np.broadcast_to([(0.0, -ENDPLATE_PX / 2), (0.0, ENDPLATE_PX / 2)], (len(patches), 2, 2))

    def greys(scan, indices, pixel_mm):
        return [np.full((150, 120, 3), 0.2 * index, np.float32) for index in indices]

    monkeypatch.setattr(endplates, "_ends", ends)
    monkeypatch.setattr(endplates, "with_neighbours", greys)
    second_look([{}], Scan(np.zeros((150, 120, 5), np.float32), SCAN.affine, "short"), column_of())
    slices = [*range(3), *(index for _ in range(2) for index in range(3) for _ in range(2))]  # S1 has one endplate
    patches = seen[0][: len(slices)]
    np.testing.assert_allclose(patches.max((1, 2)), np.array([0.2, 0.4, 0.6])[slices], rtol=1e-5)
    assert patches[0, -1].max() == 0
    assert patches[0, 0].min() > 0


def test_an_endplate_that_leaves_the_image_stays(monkeypatch):
    def ends(variables, patches):
        return np.broadcast_to([(3.0, -ENDPLATE_PX / 2), (3.0, ENDPLATE_PX / 2)], (len(patches), 2, 2))

    monkeypatch.setattr(endplates, "_ends", ends)
    before = column_of()
    cut = Scan(SCAN.voxels[:100], SCAN.affine, "cut")  # through the lower body, at 115 mm; S1 is not in it
    after = second_look([{}], cut, before)
    assert after.groups[0].members[2].corners is before.groups[0].members[2].corners
    np.testing.assert_array_equal(after.groups[1].corners[2:], before.groups[1].corners[2:])  # at 128 mm
    assert (after.groups[3].corners[2:] != before.groups[3].corners[2:]).any()  # at 93 mm
    nothing = Scan(SCAN.voxels[:50], SCAN.affine, "empty")
    assert second_look([{}], nothing, before) is before


def test_the_column_stays_where_the_network_answers_what_was_there(monkeypatch):
    def ends(variables, patches):
        return np.broadcast_to([(0.0, -ENDPLATE_PX / 2), (0.0, ENDPLATE_PX / 2)], (len(patches), 2, 2))

    monkeypatch.setattr(endplates, "_ends", ends)
    before = column_of()
    after = second_look([{}], SCAN, before)
    for old, new in zip(before.groups, after.groups, strict=True):
        if old is not None:
            np.testing.assert_allclose(new.corners, old.corners)
            assert new.spread_mm == pytest.approx(0, abs=1e-6)


# Training ------------------------------------------------------------------------------------------------------------


def dots():
    """A slice with two bodies and the sacrum, bright dots at the ends of their endplates."""
    image = np.full((220, 200, 3), 0.1, np.float32)
    corners = np.full((MAX_POINTS, 4, 2), np.nan, np.float32)
    centres, kinds = np.full((MAX_POINTS, 2), -1e3, np.float32), np.zeros(MAX_POINTS, np.int32)
    for place, (row, kind) in enumerate(((60.0, A_BODY), (100.0, A_BODY), (140.0, THE_SACRUM), (20.0, DOUBTFUL))):
        corners[place] = turned(CORNERS, 10.0) + np.array([row, 90.0])
        centres[place], kinds[place] = (row, 90.0), kind
        for r, c in np.rint(corners[place]).astype(int):
            image[r - 1 : r + 2, c - 1 : c + 2] = 1.0
    corners[2, 2:] = np.nan
    return Slice(image, np.zeros(image.shape[:2], np.uint8), kinds, centres, corners)


def test_every_endplate_of_a_known_body_teaches():
    one = dots()
    data = endplates_of(stack([one, one]))
    assert data.rows.tolist() == [0] * 5 + [1] * 5
    assert data.sides.tolist() == [1, -1, 1, -1, 1] * 2  # of S1 the upper one only
    np.testing.assert_allclose(data.ends[1], one.corners[0][[3, 2]])


@pytest.mark.slow
def test_the_ends_move_with_the_patch():
    data = jax.tree.map(jnp.asarray, endplates_of(stack([dots()])))
    numbers = jnp.arange(60) % len(data.rows)
    draw = jax.jit(jax.vmap(random_patch, (0, None, 0)))
    patches, ends, unit_mm = map(np.asarray, draw(jax.random.split(jax.random.key(0), 60), data, numbers))
    assert np.isfinite(patches).all()
    assert patches.min() >= 0
    assert patches.max() <= 1.25
    assert 0.6 * SCALE < unit_mm.min() < 0.97 * SCALE < 1.03 * SCALE < unit_mm.max() < 1.4 * SCALE
    assert 0.5 < abs(ends - np.array([(0, -20), (0, 20)])).mean() < 5  # roughly placed
    contrasts = []
    for patch, two in zip(patches, ends, strict=True):
        smooth = ndimage.gaussian_filter(patch, 1.0)
        for row, column in np.rint(two + (np.array(PATCH_SHAPE) - 1) / 2).astype(int):
            if 5 <= row < PATCH_SHAPE[0] - 5 and 5 <= column < PATCH_SHAPE[1] - 5:
                around = smooth[row - 5 : row + 6, column - 5 : column + 6]
                contrasts.append(abs(smooth[row, column] - np.median(around)) / max(np.ptp(smooth), 1e-6))
    assert len(contrasts) > 80
    assert np.median(contrasts) > 0.3


def test_the_loss_is_in_mm_and_least_at_the_truth():
    true = jnp.array([[(0.0, -20.0), (0.0, 20.0)], [(1.0, -18.0), (2.0, 22.0)]])
    unit_mm = jnp.array([0.5, 1.0])
    loss, end_mm = endplate_loss(true, true, unit_mm)
    assert float(end_mm) < 2e-3
    assert float(loss) < 1e-5
    loss, end_mm = endplate_loss(true + jnp.array([[[3.0, 4.0]]]), true, unit_mm)  # 5 px: 2.5 and 5 mm
    assert float(end_mm) == pytest.approx(3.75, rel=1e-4)
    assert float(loss) == pytest.approx(np.mean([2.5 - 0.5, 5.0 - 0.5]), rel=1e-4)
