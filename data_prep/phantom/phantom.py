"""Synthetic lumbar scans: sagittal T2 contrast with known geometry, grades and lesions.

A phantom is a scan, not a disc volume: it has the slice spacings, the lordosis, the coil shading and the noise of a
real one and goes through the same extraction. What a rater would look at is drawn, and only that depends on the grades:

- Pfirrmann: the nucleus, from bright (1), cleft by a dark band (2), to grey and blurred (3), dark (4) and black (5).
- narrowing: the height of the disc.
- endplates: Schmorl's nodes, disc matter with a dark rim in the vertebral body.
- marrow: a patch next to the endplate, brighter (Modic 2) or darker (Modic 3).

Here are the grades and the whole. `phantom_spine` has the geometry, `phantom_canvas` the empty scan and what the
scanner makes of it, and `phantom_drawing` how each tissue and lesion looks.
"""

from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr

from data_prep.phantom.canvas import acquire, lay_out, place_in_patient
from data_prep.phantom.drawing import draw
from data_prep.phantom.spine import BODIES, stack_spine
from data_prep.read.scan import Scan
from spinejax.paper import NUM_DISCS, TABLE_1
from spinejax.tasks import LEVELS, PAPER_TASKS, UNLABELLED

DRAWN_LEVELS = LEVELS[-6:]
"""The discs of a phantom that carry grades."""


@dataclass(frozen=True, eq=False)
class Phantom:
    """A synthetic scan with its truth.

    Args:
        scan: float32[H, W, S], arbitrary scanner units.
        mask: uint8[H, W, S] on the same grid, by SPIDER's convention: vertebrae with their posterior elements L5 = 1 …
            T12 = 6, canal 100, discs 201 (L5-S1) … 206 (T12-L1). The sacrum, and what is in view of T11, have no
            label. A Schmorl's node counts to its vertebra.
        lesions: uint16[H, W, S]. Bit k is set where the lesion drawn for `PAPER_TASKS[k]` alters the image.
        grades: level → task name → label, `UNLABELLED` where it is missing. The lesions of a disc whose label is
            missing are drawn all the same.
        bodies: "T12" … "S1" → float64[4, 2], (row, column) in voxels, pixel centres at integers: the body's corners
            in its mid-sagittal plane, in the order upper anterior, upper posterior, lower posterior, lower anterior.
        mid_slice: "T12" … "S1" → slice coordinate of that plane.
    """

    scan: Scan
    mask: Scan
    lesions: Scan
    grades: dict[str, dict[str, int]]
    bodies: dict[str, np.ndarray]
    mid_slice: dict[str, float]


def phantom(seed: int, patient: int) -> Phantom:
    """Draw one patient's scan; a pure function of its two arguments.

    Args:
        seed: int ≥ 0. Names the data set.
        patient: int ≥ 0. Names the patient in it.

    Returns:
        The scan and its truth. Slice spacing is 2.6 to 6 mm (median 4), pixels are 0.7 to 0.9 mm.
    """
    rng, age, grades, labels = _first_draws(seed, patient)
    narrowing = np.array([disc["narrowing"] for disc in grades.values()])
    canvas, bodies = lay_out(rng, stack_spine(rng, narrowing))
    draw(rng, canvas, bodies, grades, age)
    affine = place_in_patient(rng, canvas)

    def as_scan(voxels):
        return Scan(np.ascontiguousarray(voxels.transpose(1, 2, 0)), affine, f"phantom-{seed}-{patient:05d}")

    slice_mm, *pixel_mm = canvas.spacing_mm
    told = [body for body in bodies if body.name in BODIES]
    return Phantom(
        scan=as_scan(acquire(rng, canvas)),
        mask=as_scan(canvas.mask),
        lesions=as_scan(canvas.lesions),
        grades=labels,
        bodies={body.name: body.corners / pixel_mm for body in told},
        mid_slice={body.name: float(body.centre[2] / slice_mm) for body in told},
    )


def phantom_labels(seed: int, patient: int) -> dict[str, dict[str, int]]:
    """`phantom(seed, patient).grades` without the scan: the grades are settled before anything is drawn."""
    return _first_draws(seed, patient)[-1]


def _first_draws(seed, patient):
    """The patient's generator and what it yields first: age, true grades, labels."""
    rng = np.random.default_rng([seed, patient])
    age, grades = sample_grades(rng)
    return rng, age, _by_level(grades), _by_level(hide_some(rng, grades))


def _by_level(grades):
    """int[6, 6] as level → task name → grade."""
    names = [task.name for task in PAPER_TASKS]
    return {level: dict(zip(names, row.tolist(), strict=True)) for level, row in zip(DRAWN_LEVELS, grades, strict=True)}


# Grades

# Shares of the patient's age, the level and the disc in the variance of a task's severity; the rest is the task's own.
# The four lesions share little: were they tied to the disc more closely, its signal alone would give them away.
LATENT_VARIANCE = {
    "pfirrmann": (0.42, 0.10, 0.32),
    "narrowing": (0.28, 0.10, 0.42),
    "upper_endplate": (0.05, 0.02, 0.04),
    "lower_endplate": (0.05, 0.02, 0.04),
    "upper_marrow": (0.05, 0.02, 0.04),
    "lower_marrow": (0.05, 0.02, 0.04),
}

LEVEL_EFFECT = np.array([-1.5, -0.9, -0.3, 0.3, 1.2, 1.2]) / np.std([-1.5, -0.9, -0.3, 0.3, 1.2, 1.2])


def sample_grades(rng: np.random.Generator) -> tuple[float, np.ndarray]:
    """One patient's true grades: a Gaussian copula whose marginals over the six discs are the paper's Table 1.

    Returns:
        The patient's age as a standard normal deviate; int64[6, 6]: discs from T12-L1 down, tasks as in `PAPER_TASKS`.
    """
    age, disc = rng.standard_normal(), rng.standard_normal((6, 1))
    own = rng.standard_normal((6, len(PAPER_TASKS)))
    shares = np.array([LATENT_VARIANCE[task.name] for task in PAPER_TASKS])
    weights = np.sqrt(np.column_stack([shares, 1 - shares.sum(1)]))
    severity = weights[:, 0] * age + weights[:, 1] * LEVEL_EFFECT[:, None] + weights[:, 2] * disc + weights[:, 3] * own
    return float(age), np.stack([np.searchsorted(cuts, s) for cuts, s in zip(_CUTS, severity.T, strict=True)], axis=1)


def hide_some(rng: np.random.Generator, grades: np.ndarray) -> np.ndarray:
    """The grades as labels: each is `UNLABELLED` with its task's rate of missing labels in Table 1 (0.2 to 1 %)."""
    missing = np.array([1 - sum(TABLE_1[task.name]) / NUM_DISCS for task in PAPER_TASKS])
    return np.where(rng.random(grades.shape) < missing, UNLABELLED, grades)


def _cuts(name):
    """Where to cut a task's severity so that its grades, pooled over the levels, come out as Table 1's.

    The level effect is fixed, not drawn, so the pooled severity is a mixture of six normals and not quite normal.
    """
    counts, level_share = np.array(TABLE_1[name]), LATENT_VARIANCE[name][1]
    x = np.linspace(-5, 5, 4001)
    cumulative = ndtr((x[:, None] - np.sqrt(level_share) * LEVEL_EFFECT) / np.sqrt(1 - level_share)).mean(1)
    return np.interp(np.cumsum(counts)[:-1] / counts.sum(), cumulative, x)


_CUTS = [_cuts(task.name) for task in PAPER_TASKS]
