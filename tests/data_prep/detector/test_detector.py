"""The detector: chain and names on given candidates, its parts against truth, and a training run."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_prep.detector import detect as detecting
from data_prep.detector import weights
from data_prep.detector.candidates import BODY, SACRUM, Candidate, _peaks, group
from data_prep.detector.chain import best_column, columns, margin
from data_prep.detector.detect import detect
from data_prep.detector.doubt import MAX_MARGIN
from data_prep.detector.grid import OFFSET_MM, PIXEL_MM, alone, normalise, resample, with_neighbours
from data_prep.detector.network import BodyNet
from data_prep.detector.training import material, run
from data_prep.detector.training.augment import Crops, random_crop, stack
from data_prep.detector.training.cross_fitting import NUM_FOLDS, fold_of
from data_prep.detector.training.step import detector_loss
from data_prep.detector.training.truth import BODY as A_BODY
from data_prep.detector.training.truth import (
    DOUBTFUL,
    MAX_POINTS,
    SOURCE_MM,
    Slice,
    centre_of,
    slices_with_truth,
)
from data_prep.detector.training.truth import SACRUM as THE_SACRUM
from data_prep.read.scan import Scan
from spinejax.errors import SpinejaxError
from tests.block_spine import block_spine, sagittal_affine

# Given candidates ----------------------------------------------------------------------------------------------------


def body(row, column=60.0, *, height=26.0, depth=34.0, score=0.9, kind=BODY, tilt_deg=0.0):
    """A candidate whose centre is at (row, column) mm."""
    sin, cos = np.sin(np.deg2rad(tilt_deg)), np.cos(np.deg2rad(tilt_deg))
    down, back = np.array([cos, -sin]), np.array([sin, cos])
    centre = np.array([row, column])
    signs = np.array([[-1, -1], [-1, 1], [1, 1], [1, -1]]) / 2
    corners = centre + signs[:, :1] * height * down + signs[:, 1:] * depth * back
    return Candidate(kind, score, centre, corners)


def spine(num_bodies=6, sacrum=True):
    """Bodies 35 mm apart, the lowest (the sacrum) at 260 mm."""
    column = [body(260.0, kind=SACRUM)] if sacrum else []
    return column + [body(225.0 - 35 * number) for number in range(num_bodies)]


@pytest.fixture
def seen(monkeypatch):
    """Replace the networks: every slice shows the given candidates, turned images show none, corners stay."""

    def show(candidates):
        monkeypatch.setattr(detecting, "see", lambda variables, scan, indices: [candidates for _ in indices])
        monkeypatch.setattr(detecting, "see_images", lambda variables, images: [candidates, [], [], []])
        monkeypatch.setattr(detecting, "second_look", lambda members, scan, column: column)
        monkeypatch.setattr(detecting, "load", lambda path: [{"bodies": {}, "endplates": {}}])
        monkeypatch.setattr(detecting, "provenance", lambda path: {})

    return show


SCAN = Scan(np.zeros((300, 150, 5), np.float32), sagittal_affine((1.0, 1.0, 4.0)), "scan")


def test_levels_are_counted_from_the_sacrum_up(seen):
    seen(spine())
    found = detect(SCAN)
    assert [one.name for one in found.bodies] == ["T12", "L1", "L2", "L3", "L4", "L5", "S1"]
    assert found.notes == []
    assert min(found.confidence.values()) > 0.8
    np.testing.assert_allclose(found.bodies[0].corners, body(50.0).corners)
    assert np.isnan(found.bodies[-1].corners[2:]).all()
    assert found.bodies[0].slices == (0, 5)


def test_a_body_without_a_candidate_is_skipped_and_counted(seen):
    candidates = [one for one in spine() if one.centre[0] != 155.0]  # L3
    seen(candidates)
    found = detect(SCAN)
    assert [one.name for one in found.bodies] == ["T12", "L1", "L2", "L3", "L4", "L5", "S1"]
    assert found.confidence["L3"] == 0
    assert found.corner_mm.keys() == {"T12", "L1", "L2", "L4", "L5", "S1"}  # nothing tells how far off a placed body is
    assert any("L3 was not seen" in note for note in found.notes)
    l3 = next(one for one in found.bodies if one.name == "L3")
    np.testing.assert_allclose(l3.corners, body(155.0).corners, atol=3.0)


def test_candidates_off_the_column_are_left_out(seen):
    intruders = [body(190.0, 120.0, score=0.8), body(172.0, 62.0, score=0.5), body(100.0, 20.0, height=12, depth=15)]
    seen(spine() + intruders)
    found = detect(SCAN)
    assert [one.name for one in found.bodies] == ["T12", "L1", "L2", "L3", "L4", "L5", "S1"]
    assert all(abs(np.nanmean(one.corners[:, 1]) - 60) < 1 for one in found.bodies)


def test_without_a_sacrum_levels_are_flagged_unless_the_lowest_is_given(seen):
    seen(spine(5, sacrum=False))
    found = detect(SCAN)
    assert found.bodies[-1].name == "L5"
    assert any("no sacrum" in note and "--lowest-level" in note for note in found.notes)
    assert max(found.confidence.values()) < 0.5
    named = detect(SCAN, lowest_level="L3-L4")
    assert [one.name for one in named.bodies] == ["T12", "L1", "L2", "L3", "L4"]
    assert not any("no sacrum" in note for note in named.notes)


def test_a_short_field_of_view_and_a_transitional_vertebra_are_flagged(seen):
    seen(spine(3))
    assert any("short field of view: 3" in note for note in detect(SCAN).notes)
    seen([*spine(), body(258.0, score=0.7)])  # what looks like S1 looks like a lumbar vertebra too
    doubtful = detect(SCAN)
    assert any("transitional" in note for note in doubtful.notes)
    assert max(doubtful.confidence.values()) < 0.5
    seen([*spine(), body(226.0, score=0.5, kind=SACRUM)])  # and L5 like a sacrum
    assert any("transitional" in note for note in detect(SCAN).notes)


@pytest.mark.parametrize("candidates", [[], [body(100.0)], [body(100.0, score=0.1), body(220.0, 20.0, score=0.1)]])
def test_no_column_is_refused(seen, candidates):
    seen(candidates)
    with pytest.raises(SpinejaxError, match="no column of vertebral bodies"):
        detect(SCAN)


def test_bodies_of_another_size_are_refused(seen):
    seen([body(250.0 - 18 * number, height=13, depth=16) for number in range(7)])
    with pytest.raises(SpinejaxError, match=r"16.0 mm.*not a lumbar spine"):
        detect(SCAN)


def test_small_endplates_are_noted_above_a_sure_sacrum_and_refused_without_one(seen):
    def small(depth, sacrum):
        return [body(260.0, depth=depth, kind=SACRUM, score=sacrum)] + [
            body(234.0 - 26 * number, height=19, depth=depth) for number in range(6)
        ]

    seen(small(22.0, 0.9))
    found = detect(SCAN)
    assert [one.name for one in found.bodies][-2:] == ["L5", "S1"]
    assert any("endplates of 22.0 mm are small" in note for note in found.notes)
    for depth, sacrum in ((22.0, 0.3), (19.5, 0.9)):
        seen(small(depth, sacrum))
        with pytest.raises(SpinejaxError, match=f"endplates of {depth} mm were found, expected 23 to 55"):
            detect(SCAN)


def test_a_turned_image_is_refused(seen, monkeypatch):
    seen(spine(4, sacrum=False))
    monkeypatch.setattr(detecting, "see_images", lambda variables, images: [spine(3, sacrum=False), spine(), [], []])
    with pytest.raises(SpinejaxError, match="looks upside down"):
        detect(SCAN)


def test_a_longer_column_alone_does_not_make_an_image_turned(seen, monkeypatch):
    """Sacral segments look like bodies when the image is upside down, but the sacrum is surer the right way up."""
    here, upside_down = spine(6), [body(260.0, kind=SACRUM, score=0.15), *spine(7, sacrum=False)]
    seen(here)
    monkeypatch.setattr(detecting, "see_images", lambda variables, images: [here, upside_down, [], []])
    assert best_column(group([upside_down], [0])).score > best_column(group([here], [0])).score
    assert [one.name for one in detect(SCAN).bodies][-1] == "S1"
    seen(upside_down)
    monkeypatch.setattr(detecting, "see_images", lambda variables, images: [upside_down, here, [], []])
    with pytest.raises(SpinejaxError, match="looks upside down"):
        detect(SCAN)


def test_a_faint_sacrum_in_a_turned_image_is_ignored(seen, monkeypatch):
    here = spine(6, sacrum=False)
    seen(here)
    for score, refused in ((0.5, False), (0.6, True)):
        turned = [body(260.0, kind=SACRUM, score=score), *here]
        monkeypatch.setattr(detecting, "see_images", lambda variables, images, turned=turned: [here, turned, [], []])
        with pytest.raises(SpinejaxError, match="looks upside down") if refused else contextlib.nullcontext():
            detect(SCAN)


def test_slices_are_grouped_and_an_error_in_one_does_not_count():
    shifted = [[body(100.0 + index), body(140.0)] for index in range(5)]
    shifted[2] = [body(102.0, depth=60.0), body(140.0)]
    groups = group(shifted, range(5))
    assert sorted(len(one.members) for one in groups) == [5, 5]
    upper = min(groups, key=lambda one: one.centre[0])
    assert upper.run() == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(np.linalg.norm(upper.corners[1] - upper.corners[0]), 34.0, atol=1.0)


def test_a_body_in_one_slice_of_many_scores_low():
    groups = group([[body(100.0)], [], [], [], []], range(5))
    assert groups[0].score == pytest.approx(0.3)
    assert group([[body(100.0)]], [0])[0].score == pytest.approx(0.9)


def test_a_likely_sacrum_is_no_vertebra_even_in_a_longer_column():
    above = spine(5, sacrum=False)
    second = body(295.0, kind=SACRUM, score=0.38)

    def sacrum_of(as_sacrum, as_body):
        both = [body(260.0, kind=SACRUM, score=as_sacrum), body(260.0, score=as_body)]
        return best_column(group([[*above, *both, second]], [0])).groups[0].score

    assert sacrum_of(0.66, 0.55) == pytest.approx(0.66)
    assert sacrum_of(0.1, 0.9) == pytest.approx(0.38)


def test_the_chain_follows_lordosis():
    tilted, centre = [], np.array([260.0, 60.0])
    for number, tilt in enumerate((35.0, 22.0, 12.0, 4.0, -4.0, -8.0)):
        tilted.append(body(*centre, tilt_deg=-tilt, kind=SACRUM if number == 0 else BODY))
        centre = centre - 35 * np.array([np.cos(np.deg2rad(tilt)), np.sin(np.deg2rad(tilt))])
    column = best_column(group([tilted], [0]))
    assert len(column.groups) == 6
    assert column.sacrum is not None


def test_the_margin_is_over_the_best_column_that_counts_otherwise(seen):
    """S2 looks like a sacrum too: counted from it, every body would be one level higher."""
    column = [*spine(5), body(297.0, kind=SACRUM, score=0.3), body(260.0, score=0.4)]
    groups = group([column], [0])
    found = columns(groups)
    best = max(found, key=lambda one: one.score)
    names = {id(one): number for number, one in enumerate(best.groups)}
    others = [
        one.score
        for one in found
        if any(names.get(id(g), at) != at for at, g in enumerate(one.groups, 0 if one.sacrum else 1) if g is not None)
    ]
    assert others
    assert margin(best, found) == pytest.approx(best.score - max(others))
    assert margin(best, [best]) == np.inf
    seen(column)
    assert detect(SCAN).evidence.margin == pytest.approx(min(best.score - max(others), MAX_MARGIN))


def test_levels_are_flagged_above_the_doubt_that_is_accepted(seen):
    seen([*spine(), body(258.0, score=0.7)])
    doubt = detect(SCAN).doubt
    assert 0.05 < doubt < 1
    assert detect(SCAN, max_doubt=doubt - 0.01).doubtful_levels
    calm = detect(SCAN, max_doubt=doubt)
    assert not calm.doubtful_levels
    assert not any("--lowest-level" in note for note in calm.notes)
    assert detect(SCAN, lowest_level="L5-S1").doubt == 0


def test_one_network_looks_at_every_slice_and_all_at_the_middle_ones(seen, monkeypatch):
    looked = []

    def see(members, scan, indices):
        looked.append(([one["name"] for one in members], list(indices)))
        return [spine() for _ in indices]

    seen(spine())
    monkeypatch.setattr(detecting, "see", see)
    members = [{"bodies": {"name": number}, "endplates": {"name": number}} for number in range(5)]
    monkeypatch.setattr(detecting, "load", lambda path: members)
    scan = Scan(np.zeros((300, 150, 15), np.float32), sagittal_affine((1.0, 1.0, 4.0)), "scan")
    detect(scan)
    assert looked == [([0], list(range(15))), ([0, 1, 2, 3, 4], list(range(4, 11)))]
    looked.clear()
    detect(scan, member=3)
    assert looked == [([3], list(range(15)))]


# Grid, truth, augmentation, loss -------------------------------------------------------------------------------------


def test_resampling_keeps_places():
    image = np.zeros((80, 100))
    image[40, 60] = 1.0
    coarse = resample(image, np.array([0.5, 0.75]))
    assert np.unravel_index(np.argmax(coarse), coarse.shape) == (round(40 * 0.5 / PIXEL_MM), 60 * 0.75 / PIXEL_MM)


def test_normalising_removes_units():
    image = np.random.default_rng(0).random((50, 50))
    np.testing.assert_allclose(normalise(1000 * image + 77), normalise(image), atol=1e-5)
    assert np.isfinite(normalise(np.zeros((5, 5)))).all()


def test_padding_is_no_data():
    image = np.random.default_rng(0).random((50, 50)) + 0.5
    padded = np.pad(image, 40)
    np.testing.assert_allclose(normalise(padded)[40:-40, 40:-40], normalise(image), atol=2e-3)


def test_a_slice_comes_with_those_4_mm_away_where_the_scan_has_them():
    rng = np.random.default_rng(0)
    scan = Scan(rng.random((30, 30, 7), np.float32), sagittal_affine((1.5, 1.5, 1.9)), "thin")
    first, middle = with_neighbours(scan, [1, 3])
    for channel, index in enumerate((1, 3, 5)):  # two slices of 1.9 mm are nearest to 4 mm
        np.testing.assert_array_equal(middle[..., channel], normalise(scan.voxels[:, :, index]))
    assert (first[..., 0] == 0).all()
    np.testing.assert_array_equal(first[..., 2], normalise(scan.voxels[:, :, 3]))
    np.testing.assert_array_equal(alone(middle[..., 1])[..., 1], middle[..., 1])
    assert not alone(middle[..., 1])[..., ::2].any()


def test_truth_is_the_same_as_in_the_drawing():
    drawn = block_spine(spacing_mm=(0.8, 0.7, 4.0), num_slices=5)
    slices = slices_with_truth(drawn.scan, drawn.mask)
    assert len(slices) == 5
    one = slices[2]
    assert (one.kinds == A_BODY).sum() == 4
    assert (one.kinds == THE_SACRUM).sum() == 1
    assert (one.kinds == DOUBTFUL).sum() >= 1  # above the topmost body
    true = drawn.corners["L4"] * (0.8, 0.7) / SOURCE_MM
    assert min(abs(corners - true).max() for corners in one.corners[one.kinds == A_BODY]) < 1.0
    at = np.rint(one.centres[one.kinds == A_BODY]).astype(int)
    assert (one.tissue[at[:, 0], at[:, 1]] == 1).all()


def test_the_centre_of_a_half_known_body():
    corners = body(100.0).corners
    upper, lower = corners.copy(), corners.copy()
    upper[2:], lower[:2] = np.nan, np.nan
    np.testing.assert_allclose(centre_of(corners), (100.0, 60.0))
    np.testing.assert_allclose(centre_of(upper), (97.0, 60.0))
    np.testing.assert_allclose(centre_of(lower), (100.0, 60.0), atol=0.2)


def dots():
    """A slice whose corners are bright dots."""
    image = np.full((220, 200, 3), 0.1, np.float32)
    corners = np.full((MAX_POINTS, 4, 2), np.nan, np.float32)
    centres, kinds = np.full((MAX_POINTS, 2), -1e3, np.float32), np.zeros(MAX_POINTS, np.int32)
    for place, row in enumerate((50.0, 90.0, 130.0)):
        corners[place] = body(row, 90.0).corners
        centres[place], kinds[place] = (row, 90.0), A_BODY
        for r, c in np.rint(corners[place]).astype(int):
            image[r - 2 : r + 3, c - 2 : c + 3] = 1.0
    return Slice(image, np.zeros(image.shape[:2], np.uint8), kinds, centres, corners)


@pytest.mark.slow
def test_keypoints_move_with_the_image():
    data = stack([dots()])
    data = jax.tree.map(lambda array: jnp.asarray(array[0]), data)
    crops = jax.jit(jax.vmap(lambda key: random_crop(key, data)))(jax.random.split(jax.random.key(0), 48))
    contrasts = []
    for image, kinds, corners in zip(*map(np.asarray, (crops.image, crops.kinds, crops.corners)), strict=True):
        for row, column in np.rint(corners[kinds == A_BODY].reshape(-1, 2)).astype(int):
            if 4 <= row < image.shape[0] - 4 and 4 <= column < image.shape[1] - 4:
                ring = np.median(image[row - 4 : row + 5, column - 4 : column + 5])
                contrasts.append(abs(image[row, column] - ring))
    assert len(contrasts) > 100
    assert np.median(contrasts) > 0.15
    assert np.isfinite(np.asarray(crops.image)).all()
    assert crops.image.min() >= 0
    assert crops.image.max() <= 1.25


def test_the_loss_is_least_at_the_truth_and_ignores_doubtful_bodies():
    one = stack([dots()])
    scaled = jax.tree.map(jnp.asarray, one._replace(centres=one.centres / 1.5, corners=one.corners / 1.5))
    rows, columns = np.arange(70) * 2 + 0.5, np.arange(60) * 2 + 0.5
    cells = np.stack(np.meshgrid(rows, columns, indexing="ij"), -1)
    centres, corners = np.asarray(scaled.centres[0, :3]), np.asarray(scaled.corners[0, :3])
    away = np.linalg.norm(cells[:, :, None] - centres, axis=-1)
    offsets = (corners[away.argmin(-1)] - cells[:, :, None]) * PIXEL_MM / OFFSET_MM
    ways = corners.swapaxes(0, 1) - cells[:, :, None, None]  # [70, 60, 4, 3, 2]
    nearest = np.linalg.norm(ways, axis=-1).argmin(-1)[..., None, None]
    nearby = np.take_along_axis(ways, nearest, axis=3)[..., 0, :] * PIXEL_MM / OFFSET_MM
    offsets, nearby = (jnp.asarray(array[None], jnp.float32) for array in (offsets, nearby))
    heat = np.full((1, 70, 60, 2), -12.0)
    heat[0, ..., 0] = np.where(away.min(-1) * PIXEL_MM < 2.6, 12.0, -12.0)
    heat = jnp.asarray(heat, jnp.float32)
    right, parts = detector_loss(heat, offsets, nearby, scaled)
    assert float(parts["corner_mm"]) < 0.01
    assert float(parts["nearby_mm"]) < 0.01
    assert float(right) < 0.05
    for wrong in ((-heat, offsets, nearby), (heat, offsets + 0.3, nearby), (heat, offsets, nearby + 0.3)):
        assert float(detector_loss(*wrong, scaled)[0]) > 0.5
    # Cells further than 9 mm from any corner do not count.
    far = jnp.linalg.norm(nearby, axis=-1, keepdims=True) * OFFSET_MM > 9.01
    elsewhere = jnp.where(far, nearby + 1, nearby)
    assert float(detector_loss(heat, offsets, elsewhere, scaled)[0]) == float(right)

    doubtful = scaled._replace(kinds=jnp.where(scaled.kinds == A_BODY, DOUBTFUL, scaled.kinds))
    gradient = jax.grad(lambda logits: detector_loss(logits, offsets, nearby, doubtful)[0])(jnp.zeros((1, 70, 60, 2)))
    row, column = (int(value / 2) for value in centres[0])
    assert abs(np.asarray(gradient)[0, row, column]).max() == 0
    assert abs(np.asarray(gradient)[0, 0, 0]).max() > 0


def test_the_network_has_an_output_for_each_cell():
    variables = BodyNet().init(jax.random.key(0), jnp.zeros((1, 32, 48, 3)), train=False)
    heat, offsets, nearby = BodyNet().apply(variables, jnp.zeros((2, 64, 48, 3)), train=False)
    assert heat.shape == (2, 32, 24, 2)
    assert offsets.shape == nearby.shape == (2, 32, 24, 4, 2)


def test_corners_are_refined_by_the_cells_around_them():
    """The cells about the centre are 4 mm off, those about a corner 2 mm the other way; none is beyond the image."""
    rows, columns = np.arange(40) * 3 + 0.75, np.arange(30) * 3 + 0.75
    cells = np.stack(np.meshgrid(rows, columns, indexing="ij"), -1)
    one = body(50.0, 18.0, tilt_deg=5)
    true = one.corners
    offsets = np.broadcast_to((true + np.array([0.0, 4.0]))[None, None] - cells[:, :, None], (40, 30, 4, 2)) / OFFSET_MM
    away = np.linalg.norm(true - cells[:, :, None], axis=-1, keepdims=True)
    nearby = np.where(away < 9, true - np.array([0.0, 2.0]) - cells[:, :, None], np.nan) / OFFSET_MM
    heat = np.zeros((40, 30, 2))
    heat[..., BODY] = np.exp(-((cells - one.centre) ** 2).sum(-1) / 40)
    (found,) = _peaks(heat, offsets, nearby, np.array([80, 60]))
    np.testing.assert_allclose(found.corners, true + np.array([0.0, 1.0]), atol=1e-9)
    (found,) = _peaks(heat, offsets, nearby, np.array([80, 18]))  # the back corners are beyond the last column
    np.testing.assert_allclose(found.corners[[0, 3]], true[[0, 3]] + np.array([0.0, 1.0]), atol=1e-9)
    np.testing.assert_allclose(found.corners[[1, 2]], true[[1, 2]] + [0.0, 4.0], atol=1e-9)


# Weights -------------------------------------------------------------------------------------------------------------


def test_weights_come_back_and_damage_is_reported(tmp_path):
    variables = BodyNet().init(jax.random.key(1), jnp.zeros((1, 32, 32, 3)), train=False)
    path = tmp_path / "some.npz"
    weights.save(path, [variables], {"source": "test"})
    (back,) = weights.load(path)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), dict(variables), back)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    weights.load.cache_clear()
    with pytest.raises(SpinejaxError, match="damaged"):
        weights.load(path)
    with pytest.raises(SpinejaxError, match="cannot be read"):
        weights.load(tmp_path / "none.npz")


# A run ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@jax.numpy_dtype_promotion("standard")  # for Optax's schedule
def test_an_interrupted_run_ends_in_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "_SAVE_EVERY", 1)
    recipe = run.Recipe(steps=4, first_half=0.5, batch_size=1, phantoms=1, endplate_steps=2, endplate_batch_size=2)
    run.train_detector(None, tmp_path / "whole.npz", recipe, tell=lambda line: None)
    steps = []

    def interrupt(line):
        steps.append(line)
        if sum("step 2 of 2" in told for told in steps) == 3:  # the last step of the network for endplates
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.train_detector(None, tmp_path / "parts.npz", recipe, tell=interrupt)
    lines = []
    run.train_detector(None, tmp_path / "parts.npz", recipe, tell=lines.append)
    assert lines[:3] == [f"detector 1: continues from step {done}" for done in (2, 2, 1)]
    assert weights.weights_sum(tmp_path / "parts.npz") == weights.weights_sum(tmp_path / "whole.npz")

    # Without steps, what finds bodies stays, and the network for endplates goes on from where it was.
    kept = dataclasses.replace(recipe, steps=0)
    run.train_detector(None, tmp_path / "kept.npz", kept, begin=tmp_path / "whole.npz", tell=lines.append)
    (before,), (after,) = (weights.load(tmp_path / name) for name in ("whole.npz", "kept.npz"))
    jax.tree.map(np.testing.assert_array_equal, before["bodies"], after["bodies"])
    changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), before["endplates"], after["endplates"])
    assert all(jax.tree.leaves(changed["params"]))
    with pytest.raises(SpinejaxError, match="--steps 0: expected --begin"):
        run.train_detector(None, tmp_path / "none.npz", kept, tell=lines.append)

    with pytest.raises(SpinejaxError, match="different settings"):
        run.train_detector(None, tmp_path / "parts.npz", run.Recipe(steps=6, phantoms=1), tell=lines.append)
    with pytest.raises(SpinejaxError, match="Nothing to train on"):
        run.train_detector(None, tmp_path / "none.npz", run.Recipe(phantoms=0), tell=lines.append)


def test_a_short_run_is_short_for_both_networks():
    assert run.Recipe().endplate_steps == run.Recipe(steps=0).endplate_steps == 4000
    assert run.Recipe(steps=10).endplate_steps == 8
    assert run.Recipe(steps=10, endplate_steps=3).endplate_steps == 3
    for wrong in ({"steps": 1}, {"steps": -1}, {"endplate_steps": -1}, {"endplate_batch_size": 0}, {"batch_size": 0}):
        with pytest.raises(SpinejaxError, match="expected 2 steps or more, or 0"):
            run.Recipe(**wrong)


def test_a_detector_learns_from_all_patients_but_those_of_its_fold():
    patients = [*(f"spider/{number}" for number in range(40)), *(f"sudirman/{number}" for number in range(40)), ""]
    slices = Crops(*(np.arange(len(patients)) for _ in Crops._fields))
    slices = material.Material(slices, np.array(patients))
    learned = [set(slices.without(fold).kinds.tolist()) for fold in range(NUM_FOLDS)]
    for number, patient in enumerate(patients[:-1]):
        unseen_by = [fold for fold in range(NUM_FOLDS) if number not in learned[fold]]
        assert unseen_by == [fold_of(*patient.split("/"))]
    assert all(len(patients) - 1 in numbers for numbers in learned)  # a phantom is no patient


def test_a_run_with_other_images_of_the_same_names_is_another_run(tmp_path):
    image = tmp_path / "images" / "1_t2.mha"
    image.parent.mkdir()
    image.write_bytes(b"one")
    before = material.digest([image])
    image.write_bytes(b"two")
    assert material.digest([image]) != before
