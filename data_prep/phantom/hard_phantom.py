"""Phantoms of the spines and scans that ordinary ones do not show: to train the detector of vertebral bodies, only.

Each draws a random subset of `CHANGES`: deformities of the spine, other numbers of vertebrae, implants, contrasts other
than T2, and fields of view that end anywhere. They have no grades: some changes hide what a grade would show.

Convention for transitional vertebrae: levels are counted from the lowest body with a true disc below it, which has the
mask's label 1 and is named L5. A sacralised L5 is thus part of the sacrum, without a label, and named S1. A lumbarised
S1 has label 1, as has an L6, and one vertebra more is labelled.
"""

from collections.abc import Set
from dataclasses import replace

import numpy as np

from data_prep.phantom import deformities
from data_prep.phantom.canvas import Canvas, place_on_canvas
from data_prep.phantom.drawing import Tissue, around, choose_tissue, draw, vertebra_labels
from data_prep.phantom.phantom import Phantom, by_level, sample_grades, scanned
from data_prep.phantom.spine import Body, stack_spine
from data_prep.read.scan import Scan
from spinejax.tasks import PAPER_TASKS

# Change → the share of phantoms that have it. Of the changes of number a phantom has at most one.
CHANGES = {"scoliosis": 0.3, "slip": 0.25, "wedge": 0.25, "biconcave": 0.2, "narrow": 0.3, "implants": 0.2}
CHANGES |= {"t1": 0.25, "stir": 0.15, "fat": 0.1, "field": 0.6}
CHANGES |= {"sacralised": 0.12, "lumbarised": 0.12, "extra": 0.12}
_EXCLUSIVE = (("t1", "stir", "fat"), ("sacralised", "lumbarised", "extra"))
_STREAM = 15  # apart from the random numbers of `phantom`

_NO_LESIONS = {task.name: 0 for task in PAPER_TASKS}

# The ranges of a contrast's signals, by `Tissue`'s fields. A disc of Pfirrmann grade 4 has about half of `disc`.
_SIGNALS = {
    "t1": {
        "csf": (0.15, 0.28),
        "cord": (0.34, 0.45),
        "fat": (0.90, 1.10),
        "muscle": (0.24, 0.38),
        "marrow": (0.42, 0.70),
        "disc": (0.50, 0.75),
    },
    "stir": {
        "csf": (0.95, 1.15),
        "cord": (0.35, 0.50),
        "fat": (0.08, 0.18),
        "muscle": (0.20, 0.32),
        "marrow": (0.14, 0.28),
        "disc": (0.30, 0.50),
    },
    "fat": {  # a Dixon scan's fat image
        "csf": (0.03, 0.06),
        "cord": (0.04, 0.08),
        "fat": (0.90, 1.10),
        "muscle": (0.07, 0.14),
        "marrow": (0.45, 0.80),
        "disc": (0.12, 0.25),
    },
}


def hard_phantom(seed: int, patient: int, changes: Set[str] | None = None) -> Phantom:
    """Draw one patient's scan with these changes, of `CHANGES`, or a random subset; a pure function.

    `grades` is empty. `bodies` has every labelled vertebra and S1; a corner outside the image is NaN, and a body with
    all of them outside is left out.
    """
    rng = np.random.default_rng([seed, patient, _STREAM])
    random_changes = _sample_changes(rng)
    changes = random_changes if changes is None else changes
    age, table = sample_grades(rng)
    grades = by_level(table)
    bodies = _deformed(rng, stack_spine(rng, table[:, 1]), changes)
    canvas, bodies = place_on_canvas(rng, bodies)
    tissue = choose_tissue(rng, age)
    for contrast in sorted(changes & _SIGNALS.keys()):
        tissue = replace(tissue, **{name: rng.uniform(*span) for name, span in _SIGNALS[contrast].items()})
        if contrast != "stir":  # neither T1 nor fat shows the nucleus
            grades = {level: disc | {"pfirrmann": 3} for level, disc in grades.items()}
    if "sacralised" in changes:
        grades["S1-S2"] = _NO_LESIONS | {"pfirrmann": int(rng.integers(3, 5))}
    draw(rng, canvas, bodies, grades, tissue, age)
    if "implants" in changes:
        _draw_implants(rng, canvas, bodies, tissue)
    named = [body for body in bodies if body.name in (*vertebra_labels(bodies), "S1")]
    drawn = scanned(rng, canvas, named, {}, f"hard-phantom-{seed}-{patient:05d}")
    return _some_field(rng, drawn) if "field" in changes else drawn


def _sample_changes(rng) -> Set[str]:
    """At most one of each exclusive group, with the shares of `CHANGES`; the rest independently."""
    chosen = {name for name, share in CHANGES.items() if rng.random() < share and name not in sum(_EXCLUSIVE, ())}
    for group in _EXCLUSIVE:
        shares = np.cumsum([CHANGES[name] for name in group])
        chosen |= {*group[(at := int(np.searchsorted(shares, rng.random()))) : at + 1]}
    return chosen


def _deformed(rng, bodies, changes):
    """The bodies with the changes of shape, in the posture that they had."""
    posture_deg = deformities.mean_angle_deg(bodies)
    if "sacralised" in changes:
        bodies = deformities.sacralised(bodies, rng.uniform(2.0, 4.0))
    if "lumbarised" in changes:
        bodies = deformities.lumbarised(bodies, rng.uniform(4.0, 7.0))
    if "extra" in changes:
        bodies = deformities.with_extra_body(bodies)
    if "narrow" in changes:
        for name in rng.choice(["L1", "L2", "L3", "L4", "L5"], rng.integers(1, 3), replace=False):
            bodies = deformities.narrowed(bodies, name, rng.uniform(1.5, 3.0))
    if "slip" in changes:
        bodies = deformities.slipped(bodies, rng.choice(["L4", "L5"]), rng.uniform(5, 12))
    if "biconcave" in changes:
        # No edge of the image cuts one: from half of its mask, corners beside a deep hollow cannot be read.
        names = ["L3", "L4"] if "field" in changes else ["T12", "L1", "L2", "L3", "L4"]
        for name in rng.choice(names, rng.integers(1, 1 + len(names) // 2), replace=False):
            bodies = deformities.sunken(bodies, name, rng.uniform(3, 8))
    if "wedge" in changes:
        for name in rng.choice(["T12", "L1", "L2", "L3"], rng.integers(1, 3), replace=False):
            bodies = deformities.wedged(bodies, name, rng.uniform(0.25, 0.6))
    bodies = deformities.upright(bodies, posture_deg)
    if "scoliosis" in changes:
        aside_mm = rng.uniform(8, 25)
        bodies = deformities.bent(bodies, aside_mm, rng.uniform(280, 450), rng.uniform(0, 2 * np.pi))
    return bodies


def _draw_implants(rng, canvas: Canvas, bodies: list[Body], tissue: Tissue) -> None:
    """Metal at one level: pedicle screws with rods, and at times a cage in the disc. It leaves voids with bright rims.

    The mask is not changed: the vertebra is there, though its signal is not.
    """
    s1 = [body.name for body in bodies].index("S1")
    k = s1 - int(rng.integers(1, 4))
    upper, lower = bodies[k : k + 2]
    void_mm = rng.uniform(3.0, 6.0)
    for body in (upper, lower):
        box, u, v, w = around(canvas, body, reach=(14.0, 40.0))
        reach, side = float(np.mean(body.half_depth)), np.abs(w)
        beyond = np.maximum(np.maximum(-0.3 * reach - u, u - reach - 20), 0)
        screw = np.sqrt((v + 4) ** 2 + (side - 14) ** 2 + beyond**2) - void_mm
        beyond = np.maximum(np.abs(v) - body.half_height - 6, 0)
        rod = np.sqrt((u - reach - 20) ** 2 + (side - 15) ** 2 + beyond**2) - void_mm
        _void(canvas, box, np.minimum(screw, rod), tissue)
    if rng.random() < 0.5:
        box, u, v, w = around(canvas, upper, reach=(20.0, 0.0))
        half_disc_mm = float(np.linalg.norm(lower.top - upper.bottom)) / 2
        ellipsoid = (u - rng.uniform(-4, 4)) / 11, (v - upper.half_height - half_disc_mm) / (half_disc_mm + 1), w / 13
        _void(canvas, box, (np.sqrt(sum(axis**2 for axis in ellipsoid)) - 1) * (half_disc_mm + 1), tissue)


def _void(canvas, box, outside_mm, tissue):
    """Paint a dark void of uneven outline, and around parts of it the bright rim of displaced signal."""
    coarse, fine, _ = (texture[box] for texture in canvas.textures)
    outside_mm = outside_mm + 0.7 * fine
    canvas.paint(box, np.clip(0.4 + 0.5 * coarse, 0, 1) * np.exp(-(((outside_mm - 1.0) / 0.9) ** 2)), tissue.fat)
    canvas.paint(box, canvas.cover(-outside_mm), tissue.dark)


def _some_field(rng, drawn: Phantom) -> Phantom:
    """A field of view that ends anywhere from T12 to the middle of L2 above, from L5 to the sacrum below.

    In front it leaves 5 mm or more before the bodies, behind 20 mm or more for the canal. Half of all edges stay. No
    sliver of a body is left at the top: less than 40 % of its height does not show where its lower corners are.
    """
    column_mm = drawn.scan.spacing_mm[1]
    height, width, _ = drawn.scan.voxels.shape
    corners = np.concatenate([*drawn.bodies.values()])
    highest, lowest = drawn.bodies["T12"][:, 0].min(), drawn.bodies["S1"][:, 0].max()
    ends = [
        (0, rng.uniform(highest, drawn.bodies["L2"][:, 0].mean())),
        (height, rng.uniform(drawn.bodies["L5"][:, 0].min(), lowest)),
        (0, rng.uniform(0, max(corners[:, 1].min() - 5 / column_mm, 1))),
        (width, rng.uniform(min(corners[:, 1].max() + 20 / column_mm, width - 1), width)),
    ]
    top, bottom, front, back = (int(end[k]) for end, k in zip(ends, rng.integers(0, 2, 4), strict=True))
    for rows in (corners[:, 0] for corners in drawn.bodies.values()):
        if rows.min() < top < rows.max() and rows.max() - top < 0.4 * np.ptp(rows):
            top = int(np.ceil(rows.max()))
    return cropped(drawn, slice(top, bottom), slice(front, back))


def cropped(drawn: Phantom, rows: slice, columns: slice) -> Phantom:
    """A part of a phantom's field of view. Its truth moves along; corners outside become NaN."""
    start, shape = np.array([rows.start, columns.start]), (rows.stop - rows.start, columns.stop - columns.start)

    def part(scan):
        affine = scan.affine.copy()
        affine[:3, 3] += affine[:3, :2] @ start
        return Scan(np.ascontiguousarray(scan.voxels[rows, columns]), affine, scan.name)

    bodies = {}
    for name, corners in drawn.bodies.items():
        moved = corners - start
        inside = ((moved >= -0.5) & (moved <= np.array(shape) - 0.5)).all(1)
        if inside.any():
            bodies[name] = np.where(inside[:, None], moved, np.nan)
    return replace(
        drawn,
        scan=part(drawn.scan),
        mask=part(drawn.mask),
        lesions=part(drawn.lesions),
        bodies=bodies,
        mid_slice={name: drawn.mid_slice[name] for name in bodies},
    )
