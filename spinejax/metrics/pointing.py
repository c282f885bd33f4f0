"""How well hotspots point: maps against the masks of the lesions that a grade was given for.

Every measure is one number a disc and task, so that means come with intervals over patients. Beside each stands what
chance would give: a map that knows nothing hits a large lesion often.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from spinejax.geometry import VOLUME_SHAPE, WINDOW_SHAPE, central_window
from spinejax.metrics.grading import Estimate, mean_over_patients

TOLERANCE_MM = 3.0
"""How far from the lesion a peak may lie: about a tenth of a disc's width, and less than the next slice."""

UPPER_BODY, LOWER_BODY = 1, 3
SIDES = {"upper": UPPER_BODY, "lower": LOWER_BODY}
"""A task's prefix → the vertebral body that it speaks of, as numbered in the region mask."""


@dataclass(frozen=True)
class Pointing:
    """One task's figures.

    Args:
        n: discs with a lesion in the window.
        estimates: `hit`, `hit_by_chance`, `energy_inside`, `lesion_share` (what an even map would have inside),
            `average_precision`, and `own_side` for tasks of one vertebral body.
    """

    n: int
    estimates: dict[str, Estimate]

    def to_json(self) -> dict:
        """Fractions in [0, 1]; None where a measure is not defined."""
        return {"n": self.n, **{name: estimate.to_json() for name, estimate in self.estimates.items()}}


def point(
    map: np.ndarray, lesion: np.ndarray, affine: np.ndarray, slices: np.ndarray, *, tolerance_mm: float = TOLERANCE_MM
) -> dict[str, float]:
    """How one map points at one lesion.

    Args:
        map: float[112, 224, 9], ≥ 0.
        lesion: bool[112, 224, 9].
        affine: float[4, 4]. The disc's, whose columns are as long as its voxels.
        slices: int[2]. The volume's slices inside the scan: chance draws from these alone.
        tolerance_mm: a peak this far from the lesion still hits (the pointing game, Zhang et al., 2016).

    Returns:
        `hit` (0 or 1), `hit_by_chance`, `energy_inside`, `lesion_share`, `average_precision`; all NaN if there is no
        lesion in the window or nothing in the map.
    """
    names = ("hit", "hit_by_chance", "energy_inside", "lesion_share", "average_precision")
    if not lesion.any() or not map.any():
        return dict.fromkeys(names, np.nan)
    spacing_mm = np.linalg.norm(affine[:3, :3], axis=0)
    near = ndimage.distance_transform_edt(~lesion, sampling=spacing_mm) <= tolerance_mm
    peak = np.unravel_index(np.argmax(map), map.shape)
    valid = _in_scan(slices)
    return {
        "hit": float(near[peak]),
        "hit_by_chance": float(near[:, :, valid].mean()),
        "energy_inside": float(map[lesion].sum(dtype=np.float64) / map.sum(dtype=np.float64)),
        "lesion_share": float(lesion[:, :, valid].mean()),
        "average_precision": average_precision(map[:, :, valid], lesion[:, :, valid]),
    }


def average_precision(map: np.ndarray, lesion: np.ndarray) -> float:
    """Mean precision over the lesion's voxels, taken from the map's brightest down; ties share one threshold.

    `sklearn.metrics.average_precision_score`, without its checks. A map that knows nothing gets the lesion's share.
    """
    order = np.argsort(-map, axis=None, kind="stable")
    found = np.cumsum(lesion.ravel()[order])
    last_of_tie = np.flatnonzero(np.diff(map.ravel()[order], append=-np.inf))
    found_at = found[last_of_tie]
    new = np.diff(found_at, prepend=0)
    return float((new * found_at / (last_of_tie + 1)).sum() / found[-1]) if found[-1] else np.nan


def own_side(task_name: str, map: np.ndarray, region: np.ndarray) -> float:
    """The share of a map's energy in the two vertebral bodies that lies in the one that the task speaks of.

    It asks what the paper claims (Fig. 3), that the hotspots of a lower endplate appear in the lower endplate only, and
    needs a mask of the vertebral bodies but none of the lesions. Chance is about a half.

    Args:
        task_name: "upper_…" or "lower_…".
        map: float[112, 224, 9].
        region: uint8[112, 224, 9]. 1 in the upper body, 3 in the lower.

    Returns:
        From 0 to 1; NaN for a task of no side, or where the map is empty in both bodies.
    """
    own = SIDES.get(task_name.split("_")[0])
    if own is None:
        return np.nan
    energy = {body: map[region == body].sum(dtype=np.float64) for body in SIDES.values()}
    both = sum(energy.values())
    return float(energy[own] / both) if both > 0 else np.nan


def lesion_of(mask: np.ndarray, bit: int) -> np.ndarray:
    """bool[112, 224, 9]: a task's lesion in the identity window, from a disc's mask; `bit` is the task's column."""
    return (central_window(mask) >> np.array(bit, mask.dtype) & 1).astype(bool)


def summarise(measures: Sequence[dict[str, float]], patients: Sequence[str]) -> Pointing:
    """One task's figures over discs: means and 95 % intervals over patients."""
    columns = {name: np.array([each[name] for each in measures]) for name in measures[0]} if measures else {}
    estimates = {name: mean_over_patients(column, np.asarray(patients)) for name, column in columns.items()}
    n = int((~np.isnan(columns["hit"])).sum()) if "hit" in columns else 0
    return Pointing(n=n, estimates=estimates)


def _in_scan(slices: np.ndarray) -> np.ndarray:
    place = np.arange(WINDOW_SHAPE[2]) + (VOLUME_SHAPE[2] - WINDOW_SHAPE[2]) // 2
    return (place >= slices[0]) & (place < slices[1])
