"""How well hotspots point: maps against masks of the lesions that a grade was given for.

Each measure is one number for each disc and task, so that means come with intervals over patients. It is
reported with what chance would give: a map without information often hits a large lesion.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Integer, Real
from scipy import ndimage

from spinejax.geometry import VOLUME_SHAPE, WINDOW_SHAPE, central_window
from spinejax.metrics.grading import Estimate, mean_over_patients

TOLERANCE_MM = 3.0
"""A peak this far from the lesion still hits: about a tenth of a disc's width, and less than the next slice."""

UPPER_BODY, LOWER_BODY = 1, 3
SIDES = {"upper": UPPER_BODY, "lower": LOWER_BODY}
"""A task's prefix → its vertebral body, as numbered in the region mask."""

MEASURES = ("hit", "hit_by_chance", "energy_inside", "lesion_share", "average_precision")
"""`lesion_share` is the energy that an even map would have inside."""


@dataclass(frozen=True)
class Pointing:
    """The metrics of one task, of which `n` discs have a lesion in the window."""

    n: int
    estimates: Mapping[str, Estimate]
    """For `MEASURES`, and `own_side` for tasks of one vertebral body."""

    def to_json(self) -> dict:
        """Fractions in [0, 1]; None where a measure is not defined."""
        return {"n": self.n, **{name: estimate.to_json() for name, estimate in self.estimates.items()}}


def point(
    map: Float[np.ndarray, "112 224 9"],
    lesion: Bool[np.ndarray, "112 224 9"],
    affine: Float[np.ndarray, "4 4"],
    slices: Integer[np.ndarray, "2"],
    *,
    tolerance_mm: float = TOLERANCE_MM,
) -> dict[str, float]:
    """How one map points at one lesion (the pointing game, Zhang et al., 2016): measure → value, for `MEASURES`.

    All are NaN if the window has no lesion or the map is empty.

    Args:
        map: the hotspot, ≥ 0.
        affine, slices: the disc's, as in its shard. Chance draws from the slices inside the scan alone.
        tolerance_mm: a peak this far from the lesion still hits.
    """
    if not lesion.any() or not map.any():
        return dict.fromkeys(MEASURES, np.nan)
    spacing_mm = np.linalg.norm(affine[:3, :3], axis=0)
    near = ndimage.distance_transform_edt(~lesion, sampling=spacing_mm) <= tolerance_mm
    peak = np.unravel_index(np.argmax(map), map.shape)
    place = np.arange(WINDOW_SHAPE[2]) + (VOLUME_SHAPE[2] - WINDOW_SHAPE[2]) // 2
    valid = (place >= slices[0]) & (place < slices[1])
    return {
        "hit": float(near[peak]),
        "hit_by_chance": float(near[:, :, valid].mean()),
        "energy_inside": float(map[lesion].sum(dtype=np.float64) / map.sum(dtype=np.float64)),
        "lesion_share": float(lesion[:, :, valid].mean()),
        "average_precision": average_precision(map[:, :, valid], lesion[:, :, valid]),
    }


def average_precision(map: Float[np.ndarray, "*shape"], lesion: Bool[np.ndarray, "*shape"]) -> float:
    """Mean precision over the lesion's voxels, taken from the map's brightest down; ties share one threshold.

    `sklearn.metrics.average_precision_score`, without its checks. A map without information gets the lesion's share.
    """
    order = np.argsort(-map, axis=None, kind="stable")
    found = np.cumsum(lesion.ravel()[order])
    last_of_tie = np.flatnonzero(np.diff(map.ravel()[order], append=-np.inf))
    found_at = found[last_of_tie]
    new = np.diff(found_at, prepend=0)
    return float((new * found_at / (last_of_tie + 1)).sum() / found[-1]) if found[-1] else np.nan


def own_side(task_name: str, map: Float[np.ndarray, "*shape"], region: Real[np.ndarray, "*shape"]) -> float:
    """The share of a map's energy in the two vertebral bodies that is in the task's own one.

    It measures what the paper claims (Fig. 3), that the hotspots of a lower endplate appear in the lower endplate only.
    It needs the region mask but none of lesions. Chance is the body's share of the area of both, in a window about 0.56
    for the upper one. It is NaN for a task whose name begins with neither "upper_" nor "lower_", and where the map is
    empty in both bodies.
    """
    own = SIDES.get(task_name.split("_")[0])
    if own is None:
        return np.nan
    energy = {body: map[region == body].sum(dtype=np.float64) for body in SIDES.values()}
    both = sum(energy.values())
    return float(energy[own] / both) if both > 0 else np.nan


def lesion_of(mask: Integer[np.ndarray, "192 320 15"], bit: int) -> Bool[np.ndarray, "112 224 9"]:
    """A task's lesion in the identity window, from a disc's lesion mask; `bit` is the task's column."""
    return (central_window(mask) >> np.array(bit, mask.dtype) & 1).astype(bool)


def summarise(measures: Sequence[Mapping[str, float]], patients: Sequence[str]) -> Pointing:
    """One task's measures over discs: means and 95 % intervals over patients."""
    columns = {name: np.array([each[name] for each in measures]) for name in measures[0]} if measures else {}
    estimates = {name: mean_over_patients(column, np.asarray(patients)) for name, column in columns.items()}
    return Pointing(n=int((~np.isnan(columns.get("hit", np.empty(0)))).sum()), estimates=estimates)
