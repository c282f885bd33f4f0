"""Synthetic lumbar scans: sagittal T2 contrast with known geometry, grades and lesions.

A phantom is a scan, not a disc volume: it has the slice spacings, the lordosis, the coil shading and the noise of a
real one, and discs are cut out of it in the same way. Only what a rater would look at depends on the grades:

- Pfirrmann: the nucleus, from bright (1), cleft by a dark band (2), to grey and blurred (3), dark (4) and black (5).
- narrowing: the height of the disc.
- endplates: Schmorl's nodes, disc matter with a dark rim in the vertebral body.
- marrow: a patch next to the endplate, brighter (Modic 2) or darker (Modic 3).

This file has the grades and the whole; `spine` has the geometry, `canvas` the empty scan and the scanner's effects, and
`drawing` the look of each tissue and lesion.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy.special import ndtr

from data_prep.phantom.canvas import Canvas, acquire, place_in_patient, place_on_canvas
from data_prep.phantom.drawing import choose_tissue, draw
from data_prep.phantom.spine import BODIES, Body, stack_spine
from data_prep.read.scan import Scan
from spinejax.paper import NUM_DISCS, TABLE_1
from spinejax.tasks import LEVELS, PAPER_TASKS, UNLABELLED

DRAWN_LEVELS = LEVELS[-6:]  # the discs of a phantom that have grades


@dataclass(frozen=True, eq=False)
class Phantom:
    """A synthetic scan with its truth.

    The mask has SPIDER's labels: vertebrae with their posterior elements L5 = 1 … T12 = 6, canal 100, discs 201 (L5-S1)
    … 206 (T12-L1). The sacrum and T11 have no label. A Schmorl's node belongs to its vertebra.
    """

    scan: Scan  # in arbitrary scanner units
    mask: Scan
    lesions: Scan  # bit k is set where the lesion drawn for `PAPER_TASKS[k]` changes the image
    grades: dict[str, dict[str, int]]  # level → task name → label; a lesion is drawn even if its label is missing
    bodies: dict[str, Float[np.ndarray, "4 2"]]  # "T12" … "S1" → corners in the body's mid-sagittal plane
    mid_slice: dict[str, float]  # "T12" … "S1" → slice coordinate of that plane


def phantom(seed: int, patient: int) -> Phantom:
    """Draw one patient's scan; a pure function of two integers, 0 or more.

    Slice spacing is 2.6 to 6 mm (median 4), pixels are 0.7 to 0.9 mm.
    """
    rng, age, grades, labels = _first_draws(seed, patient)
    narrowing = np.array([disc["narrowing"] for disc in grades.values()])
    canvas, bodies = place_on_canvas(rng, stack_spine(rng, narrowing))
    draw(rng, canvas, bodies, grades, choose_tissue(rng, age), age)
    return scanned(
        rng, canvas, [body for body in bodies if body.name in BODIES], labels, f"phantom-{seed}-{patient:05d}"
    )


def scanned(
    rng: np.random.Generator, canvas: Canvas, named: list[Body], labels: dict[str, dict[str, int]], name: str
) -> Phantom:
    """A drawn canvas as a scan of this name, with the truth of the named bodies and these grades."""
    affine = place_in_patient(rng, canvas)

    def as_scan(voxels):
        return Scan(np.ascontiguousarray(voxels.transpose(1, 2, 0)), affine, name)

    slice_mm, *pixel_mm = canvas.spacing_mm
    return Phantom(
        scan=as_scan(acquire(rng, canvas)),
        mask=as_scan(canvas.mask),
        lesions=as_scan(canvas.lesions),
        grades=labels,
        bodies={body.name: body.corners / pixel_mm for body in named},
        mid_slice={body.name: float(body.centre[2] / slice_mm) for body in named},
    )


def phantom_labels(seed: int, patient: int) -> dict[str, dict[str, int]]:
    """`phantom(seed, patient).grades` without the scan: grades are sampled before anything is drawn."""
    return _first_draws(seed, patient)[-1]


def _first_draws(seed, patient):
    """The patient's generator, and its first draws: age, true grades, labels."""
    rng = np.random.default_rng([seed, patient])
    age, grades = sample_grades(rng)
    return rng, age, by_level(grades), by_level(hide_some(rng, grades))


def by_level(grades: Int[np.ndarray, "6 6"]) -> dict[str, dict[str, int]]:
    """Level → task name → grade, from rows of grades."""
    names = [task.name for task in PAPER_TASKS]
    return {level: dict(zip(names, row.tolist(), strict=True)) for level, row in zip(DRAWN_LEVELS, grades, strict=True)}


# Shares of the patient's age, the level and the disc in the variance of a task's severity; the remainder is the task's
# own. The four lesions share little: if they depended on the disc more, its signal alone would reveal them.
LATENT_VARIANCE = {"pfirrmann": (0.42, 0.10, 0.32), "narrowing": (0.28, 0.10, 0.42)}
LATENT_VARIANCE |= {task.name: (0.05, 0.02, 0.04) for task in PAPER_TASKS if task.name not in LATENT_VARIANCE}

LEVEL_EFFECT = np.array([-1.5, -0.9, -0.3, 0.3, 1.2, 1.2]) / np.std([-1.5, -0.9, -0.3, 0.3, 1.2, 1.2])


def sample_grades(rng: np.random.Generator) -> tuple[float, Int[np.ndarray, "6 6"]]:
    """A patient's age as a standard normal deviate, and true grades: discs from T12-L1 down, tasks as in `PAPER_TASKS`.

    The grades are a Gaussian copula whose marginals over the six discs are the paper's Table 1.
    """
    age, disc = rng.standard_normal(), rng.standard_normal((6, 1))
    own = rng.standard_normal((6, len(PAPER_TASKS)))
    shares = np.array([LATENT_VARIANCE[task.name] for task in PAPER_TASKS])
    weights = np.sqrt(np.column_stack([shares, 1 - shares.sum(1)]))
    severity = weights[:, 0] * age + weights[:, 1] * LEVEL_EFFECT[:, None] + weights[:, 2] * disc + weights[:, 3] * own
    return float(age), np.stack([np.searchsorted(cuts, s) for cuts, s in zip(_CUTS, severity.T, strict=True)], axis=1)


def hide_some(rng: np.random.Generator, grades: Int[np.ndarray, "*discs 6"]) -> Int[np.ndarray, "*discs 6"]:
    """The grades as labels: each is `UNLABELLED` with its task's rate of missing labels in Table 1 (0.2 to 1 %)."""
    missing = np.array([1 - sum(TABLE_1[task.name]) / NUM_DISCS for task in PAPER_TASKS])
    return np.where(rng.random(grades.shape) < missing, UNLABELLED, grades)


def _cuts(name):
    """The cuts of a task's severity that give its grades, pooled over the levels, Table 1's frequencies.

    The level effect is fixed, not drawn, so the pooled severity is a mixture of six normals, not a normal.
    """
    counts, level_share = np.array(TABLE_1[name]), LATENT_VARIANCE[name][1]
    x = np.linspace(-5, 5, 4001)
    cumulative = ndtr((x[:, None] - np.sqrt(level_share) * LEVEL_EFFECT) / np.sqrt(1 - level_share)).mean(1)
    return np.interp(np.cumsum(counts)[:-1] / counts.sum(), cumulative, x)


_CUTS = [_cuts(task.name) for task in PAPER_TASKS]
