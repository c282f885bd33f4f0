"""Synthetic lumbar scans: sagittal T2 contrast with known geometry, grades and lesions.

A phantom is a scan, not a disc volume: it has the slice spacings, the lordosis, the coil shading and the noise of a
real one and goes through the same extraction. What a rater would look at is drawn, and only that depends on the grades:

- Pfirrmann: the nucleus, from bright (1), cleft by a dark band (2), to grey and blurred (3), dark (4) and black (5).
- narrowing: the height of the disc.
- endplates: Schmorl's nodes, disc matter with a dark rim in the vertebral body.
- marrow: a patch next to the endplate, brighter (Modic 2) or darker (Modic 3).

Everything else is nuisance: contrast between tissues, marrow texture, veins, haemangiomas, annular fissures, shading.
Lengths are in mm in the scan's own frame (y down, x to the back, z to the patient's left); CSF has a signal about 1.
Rendering keeps slices first, (S, H, W), so that numpy's inner loop runs over a whole row.
"""

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from scipy.interpolate import PchipInterpolator
from scipy.special import ndtr

from data_prep.scan import Scan
from spinejax.paper import NUM_DISCS, TABLE_1
from spinejax.tasks import LEVELS, PAPER_TASKS, UNLABELLED

DRAWN_LEVELS = LEVELS[-6:]
BODIES = ("T12", "L1", "L2", "L3", "L4", "L5", "S1")
CANAL_LABEL, LOWEST_DISC_LABEL = 100, 201


@dataclass(frozen=True)
class Anatomy:
    """Sizes of an average adult. Tuples run from the top down: bodies T12 … S1, discs T12-L1 … L5-S1."""

    body_height_mm: tuple = (25.0, 26.0, 27.0, 27.5, 27.5, 27.5, 28.0)
    body_half_depth_mm: tuple = (15.2, 15.8, 16.4, 16.9, 17.3, 17.4, 17.2)
    body_half_width_mm: tuple = (21.0, 22.0, 23.0, 24.0, 25.0, 26.0, 27.0)
    body_wedge_deg: tuple = (-3.0, -2.0, 0.0, 1.0, 2.0, 7.0, 2.0)
    disc_height_mm: tuple = (8.3, 8.8, 9.3, 9.8, 10.2, 9.8)
    disc_wedge_deg: tuple = (2.0, 3.0, 5.0, 6.0, 9.0, 11.0)
    height_by_narrowing: tuple = (1.0, 0.76, 0.55, 0.34)
    concavity_mm: float = 0.9
    waist_mm: float = 1.7
    canal_half_depth_mm: float = 7.5
    canal_half_width_mm: float = 11.0
    canal_behind_body_mm: float = 8.6


ANATOMY = Anatomy()

# By Pfirrmann grade: nucleus and annulus against marrow, softness of their border, inhomogeneity. Grades 1 and 2 differ
# by little but the cleft, and contrast varies between scans by nearly as much as a grade: structure has to tell.
NUCLEUS = (
    (1.75, 0.30, 0.12, 0.03),
    (1.62, 0.30, 0.15, 0.06),
    (1.02, 0.48, 0.45, 0.24),
    (0.60, 0.38, 0.70, 0.14),
    (0.26, 0.22, 0.70, 0.35),
)

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

NODE_WALL_MM = 1.6
LEVEL_EFFECT = np.array([-1.5, -0.9, -0.3, 0.3, 1.2, 1.2]) / np.std([-1.5, -0.9, -0.3, 0.3, 1.2, 1.2])


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
    rng = np.random.default_rng([seed, patient])
    age, grades = sample_grades(rng)
    labels = hide_some(rng, grades)
    bodies = _spine(rng, grades[:, _index("narrowing")])
    canvas, bodies = _lay_out(rng, bodies)
    tissue = _tissue(rng, age)
    canal = _canal(bodies)
    _draw_surroundings(rng, canvas, canal, tissue, age)
    _draw_canal(canvas, canal, bodies[2], tissue)
    marrow = tissue["marrow"] * np.exp(rng.normal(0, 0.06, len(bodies)))
    sides = rng.choice([-1, 1], (len(bodies), 2))
    for k, (upper, lower) in enumerate(pairwise(bodies)):
        _draw_disc(rng, canvas, upper, lower, k - 1, grades, tissue)
    for k, body in enumerate(bodies):
        _draw_vertebra(rng, canvas, body, k - 1, marrow[k], sides[k], grades, tissue)
    for k, body in enumerate(bodies):
        _draw_nodes(rng, canvas, body, k - 1, -sides[k], grades, tissue)

    patient_name = f"phantom-{seed}-{patient:05d}"
    affine = _affine(rng, canvas)

    def as_scan(voxels):
        return Scan(np.ascontiguousarray(voxels.transpose(1, 2, 0)), affine, patient_name)

    named = dict(zip(BODIES, bodies[1:8], strict=True))
    return Phantom(
        scan=as_scan(_acquire(rng, canvas)),
        mask=as_scan(canvas.mask),
        lesions=as_scan(canvas.lesions),
        grades={
            level: {task.name: int(labels[i, t]) for t, task in enumerate(PAPER_TASKS)}
            for i, level in enumerate(DRAWN_LEVELS)
        },
        bodies={name: _corners(body) / canvas.spacing_mm[1:] for name, body in named.items()},
        mid_slice={name: float(body.centre[2] / canvas.spacing_mm[0]) for name, body in named.items()},
    )


# Grades


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


def _index(name):
    return [task.name for task in PAPER_TASKS].index(name)


_MARROW_BITS = np.uint16(1 << _index("upper_marrow") | 1 << _index("lower_marrow"))


# Geometry


@dataclass(frozen=True, eq=False)
class Body:
    """A vertebral body: a drum whose outline in the sagittal plane is a quadrilateral with hollow sides.

    `angle_deg` turns its front-to-back axis upwards; `shear` is the shift of (y, x) per mm of z, which is how scoliosis
    tilts and turns it: a shear, unlike a rotation, leaves the mid-sagittal outline in one slice.
    """

    centre: np.ndarray
    angle_deg: float
    wedge_deg: float
    half_height: float
    half_depth: tuple[float, float]
    half_width: float
    shear: tuple[float, float] = (0.0, 0.0)

    @property
    def axes(self):
        """Unit vectors (y, x) to the back and to the feet."""
        sin, cos = np.sin(np.deg2rad(self.angle_deg)), np.cos(np.deg2rad(self.angle_deg))
        return np.array([-sin, cos]), np.array([cos, sin])

    @property
    def slope(self):
        return np.tan(np.deg2rad(self.wedge_deg / 2))


def _corners(body):
    """float64[4, 2]: the corners (y, x) in mm."""
    back, down = body.axes
    upper, lower = body.half_depth
    along = np.array([-upper, upper, lower, -lower])
    below = np.array([-1, -1, 1, 1]) * (body.half_height - body.slope * along)
    return body.centre[:2] + along[:, None] * back + below[:, None] * down


def _spine(rng, narrowing):
    """Eleven bodies, T11 … S3, stacked upwards from the sacrum; then stood upright, tilted and bent sideways.

    The disc heights are the narrowing grades; wedges shrink with them, as the lordosis of a worn spine does.
    """
    a = ANATOMY
    size, lordosis = rng.uniform(0.92, 1.08), rng.uniform(0.7, 1.4)
    factor = np.array(a.height_by_narrowing)[narrowing] * np.exp(rng.normal(0, 0.035, 6))
    disc_height = size * np.array([7.0, *(factor * a.disc_height_mm)])
    disc_wedge = lordosis * np.array([1.0, *(factor * a.disc_wedge_deg)])
    heights = size * np.array([a.body_height_mm[0], *a.body_height_mm]) * rng.normal(1, 0.025, 8)
    wedges = np.array([-3.0, *a.body_wedge_deg]) + rng.normal(0, 1.0, 8)
    depths = size * np.array([a.body_half_depth_mm[0], *a.body_half_depth_mm]) * rng.normal(1, 0.015, 8)
    widths = size * np.array([a.body_half_width_mm[0], *a.body_half_width_mm])

    stacked = []
    foot, angle = np.zeros(2), 0.0  # the middle of the next body's lower endplate, and that endplate's angle
    for k in range(7, -1, -1):
        lower_depth = 0.68 * depths[k] if k == 7 else depths[k] * rng.normal(1.0, 0.012)
        body = Body(np.zeros(3), angle - wedges[k] / 2, wedges[k], heights[k] / 2, (depths[k], lower_depth), widths[k])
        centre = foot - body.half_height * body.axes[1]
        stacked.append(replace(body, centre=np.array([*centre, 0.0])))
        if k:
            upper_angle = angle - wedges[k]
            angle = upper_angle - disc_wedge[k - 1]
            between = np.deg2rad((upper_angle + angle) / 2)
            slip = rng.normal(0, 0.6) * np.array([-np.sin(between), np.cos(between)])
            foot = centre - body.half_height * body.axes[1] + slip
            foot = foot - disc_height[k - 1] * np.array([np.cos(between), np.sin(between)])
    bodies = stacked[::-1] + _lower_sacrum(stacked[0], size)
    tilt = rng.normal(0, 4.0) - np.mean([body.angle_deg for body in bodies[2:6]])
    return _bend_sideways(rng, [_turn(body, np.clip(tilt, -60, 60)) for body in bodies])


def _lower_sacrum(s1, size):
    """S2 and S3, each under the one before behind a remnant of a disc."""
    bodies = [s1]
    for height, upper, lower, turn in ((23.0, 11.0, 9.0, 3.0), (20.0, 8.5, 7.0, -12.0)):
        above = bodies[-1]
        body = replace(
            above,
            angle_deg=above.angle_deg + turn,
            half_height=size * height / 2,
            half_depth=(size * upper, size * lower),
            wedge_deg=0.0,
            half_width=0.85 * above.half_width,
        )
        joint = above.centre[:2] + (above.half_height + 1.2) * above.axes[1]
        bodies.append(replace(body, centre=np.array([*(joint + (body.half_height + 1.2) * body.axes[1]), 0.0])))
    return bodies[1:]


def _turn(body, angle_deg):
    sin, cos = np.sin(np.deg2rad(angle_deg)), np.cos(np.deg2rad(angle_deg))
    y, x, z = body.centre
    centre = np.array([cos * y - sin * x, sin * y + cos * x, z])
    return replace(body, centre=centre, angle_deg=body.angle_deg + angle_deg)


def _bend_sideways(rng, bodies):
    """Mild scoliosis: the bodies follow one sine wave to the side, tilt with it and turn about their axis."""
    amplitude, phase, period = rng.normal(0, 2.5), rng.uniform(0, 2 * np.pi), rng.uniform(220, 400)
    turn = rng.normal(0, 0.03)
    bent = []
    for body in bodies:
        wave = 2 * np.pi * body.centre[0] / period + phase
        side, lean = amplitude * np.sin(wave), amplitude * np.cos(wave) * 2 * np.pi / period
        centre = np.array([*body.centre[:2], np.clip(side, -6, 6)])
        bent.append(replace(body, centre=centre, shear=(-lean, turn * np.sin(wave))))
    return bent


@dataclass(frozen=True, eq=False)
class Canvas:
    """What is being drawn, slices first: (S, H, W); `spacing_mm` likewise. `textures`: unit-variance fields,
    coarse, fine and drawn out like fibres.
    """

    image: np.ndarray
    mask: np.ndarray
    lesions: np.ndarray
    spacing_mm: np.ndarray
    textures: tuple[np.ndarray, np.ndarray, np.ndarray]

    @property
    def pixel_mm(self):
        return float(self.spacing_mm[1:].mean())

    def coordinates(self, box=(slice(None),) * 3):
        """float32 y[1, h, 1], x[1, 1, w], z[s, 1, 1] in mm within a box."""
        z, y, x = (
            np.arange(n, dtype=np.float32)[s] * np.float32(d)
            for n, s, d in zip(self.image.shape, box, self.spacing_mm, strict=True)
        )
        return y[None, :, None], x[None, None, :], z[:, None, None]

    def box(self, low, high):
        """Index slices that hold a box given in mm as (y, x)."""
        starts = np.floor(np.array(low) / self.spacing_mm[1:]).astype(int)
        stops = np.ceil(np.array(high) / self.spacing_mm[1:]).astype(int) + 1
        return (slice(None), *(slice(max(0, a), max(0, b)) for a, b in zip(starts, stops, strict=True)))

    def cover(self, inside_mm):
        """Share of each pixel that is inside, from the signed distance to the edge: partial volume without stairs."""
        return np.clip(0.5 + inside_mm / self.pixel_mm, 0, 1)


def _lay_out(rng, bodies):
    """An empty canvas, and the bodies moved onto it, off-centre, with T11 always cut off by the upper edge."""
    slice_mm = float(np.clip(np.exp(rng.normal(np.log(4.0), 0.22)), 2.6, 6.0))
    row_mm = rng.uniform(0.70, 0.88)
    spacing = np.array([slice_mm, row_mm, row_mm * rng.choice([1.0, 1.0, rng.uniform(0.97, 1.03)])])
    num_slices = int(np.clip(round(rng.uniform(56, 68) / slice_mm), 11, 17))
    top = _corners(bodies[1])[:, 0].min() - rng.uniform(10, 22)
    bottom = _corners(bodies[7])[:, 0].max() + rng.uniform(12, 40)
    width_mm = rng.uniform(200, 235)
    left = bodies[4].centre[1] - rng.uniform(0.42, 0.55) * width_mm
    middle_z = (num_slices - 1) / 2 * slice_mm + rng.uniform(-1, 1) * min(5.0, 1.2 * slice_mm)
    shift = np.array([-top, -left, middle_z])
    shape = (num_slices, *np.ceil(np.array([bottom - top, width_mm]) / spacing[1:]).astype(int))
    textures = tuple(_texture(rng, shape, spacing, grain_mm) for grain_mm in (9.0, 3.0, (6.0, 9.0, 2.0)))
    image, mask, lesions = (np.zeros(shape, dtype) for dtype in (np.float32, np.uint8, np.uint16))
    canvas = Canvas(image, mask, lesions, spacing, textures)
    return canvas, [replace(body, centre=body.centre + shift) for body in bodies]


def _texture(rng, shape, spacing_mm, grain_mm):
    """float32[S, H, W]: smooth noise of unit variance; `grain_mm` is its grain, one number or one per axis."""
    grains_mm = np.broadcast_to(grain_mm, 3)
    across_slices, down, along = (
        _spline_weights(rng.random() + np.arange(n) * d / g)
        for n, d, g in zip(shape, spacing_mm, grains_mm, strict=True)
    )
    field = rng.standard_normal([len(m.T) for m in (across_slices, down, along)], dtype=np.float32)
    field = down @ (field @ along.T)
    field = (across_slices @ field.reshape(len(field), -1)).reshape(shape)
    return field / field.std()


def _spline_weights(position):
    """float32[n, nodes]: cubic B-spline weights, which hide the lattice that linear ones show."""
    distance = np.abs(position[:, None] - np.arange(-1, int(position[-1]) + 3))
    near = 2 / 3 - distance**2 + distance**3 / 2
    return np.where(distance < 1, near, np.clip(2 - distance, 0, None) ** 3 / 6).astype(np.float32)


# Drawing


def _tissue(rng, age):
    """The signals of this scan's tissues; marrow turns to fat with age, and sequences differ in contrast."""
    marrow = float(np.clip(0.44 * np.exp(0.07 * age + rng.normal(0, 0.13)), 0.28, 0.6))
    return {
        "csf": rng.uniform(0.95, 1.15),
        "cord": rng.uniform(0.40, 0.55),
        "fat": rng.uniform(0.65, 0.85),
        "muscle": rng.uniform(0.12, 0.22),
        "dark": rng.uniform(0.03, 0.07),
        "marrow": marrow,
        "disc": marrow * np.exp(rng.normal(0, 0.18)),
        "heterogeneity": rng.uniform(0.03, 0.09),
    }


def _paint(canvas, box, cover, value):
    """Blend a value into a box, in proportion to what covers each pixel."""
    canvas.image[box] += (cover * (value - canvas.image[box])).astype(np.float32)


def _canal(bodies):
    """Smooth functions of y along the canal: the x of its middle, its half depth, the z of its middle; all in mm."""
    points, depths = [], []
    for k, body in enumerate(bodies):
        depth = ANATOMY.canal_half_depth_mm * (1.0, 0.85, 0.5, 0.3)[max(0, k - 6)]
        gap = ANATOMY.canal_behind_body_mm - ANATOMY.canal_half_depth_mm
        points.append(body.centre[:2] + (np.mean(body.half_depth) - ANATOMY.waist_mm + gap + depth) * body.axes[0])
        depths.append(depth)
    y, x = np.array(points).T
    y = np.maximum.accumulate(y + np.arange(len(y)) * 1e-3)
    return PchipInterpolator(y, np.column_stack([x, depths, [body.centre[2] for body in bodies]]))


def _along(canal, y):
    """`canal` at rows y[1, h, 1], going straight on beyond its ends: x, half depth, z and the cosine of its lean."""
    inside = np.clip(y, canal.x[0], canal.x[-1])
    middle, slope = canal(inside), canal(inside, 1)
    x, depth, z = (middle[..., i].astype(np.float32) for i in range(3))
    return x + slope[..., 0] * (y - inside), depth, z, 1 / np.sqrt(1 + slope[..., 0] ** 2)


def _draw_surroundings(rng, canvas, canal, tissue, age):
    """All that is not spine: fatty back muscle, psoas, foraminal fat, vessels, bowel, skin and the air behind it."""
    coarse, fine, fibres = canvas.textures
    y, x, z = canvas.coordinates()
    middle, _, canal_z, _ = (np.float32(value) for value in _along(canal, y))
    behind = x - middle
    aside = np.abs(z - canal_z)
    blobs = np.clip(1.5 * coarse + 0.4 * fine, -1.5, 1.5)

    streaks = np.clip(0.3 + 0.12 * age + 0.45 * fibres + 0.15 * coarse - 0.2 * np.clip((aside - 4) / 4, 0, 1), 0, 1)
    image = tissue["muscle"] + 0.7 * (tissue["fat"] - tissue["muscle"]) * streaks * streaks
    belly = tissue["fat"] * (0.48 + 0.27 * blobs)
    psoas = tissue["muscle"] * (1 + 0.12 * fibres)
    image += np.clip((-8 - behind) / 4, 0, 1) * (psoas - image)
    foramen = np.clip((8 - np.abs(behind + 2)) / 3, 0, 1) * np.clip((aside - 11) / 3, 0, 1)
    image += foramen * (tissue["fat"] * (0.75 + 0.12 * blobs) - image)
    front = middle - 22 - 24 * np.clip((aside - 14) / 6, 0, 1)
    image += np.clip((front - x + 2 * coarse) / 3, 0, 1) * (belly - image)
    for side, radius in ((9.0, rng.uniform(7, 10)), (-11.0, rng.uniform(7, 11))):  # aorta and vena cava, as far as L4
        from_axis = np.hypot(x - middle + 37 + radius + rng.uniform(2, 5), z - canal_z - side)
        vessel = radius - 0.8 * np.clip(y - canal.x[5], 0, 20) - from_axis
        image += canvas.cover(vessel) * (1.4 * tissue["dark"] - image)
    level = (y - canal.x[0]) / (canal.x[-1] - canal.x[0])
    back = middle.mean() + rng.uniform(48, 60) + 0.3 * (middle - middle.mean())
    skin = back + rng.uniform(6, 25) + rng.uniform(0, 14) * level
    septa = 1 - 0.35 * np.clip(1 - np.abs(fine + 0.3 * coarse) / 0.12, 0, 1)
    image += canvas.cover(x - back) * (1.05 * tissue["fat"] * septa - image)
    image *= canvas.cover(skin - x)
    canvas.image[...] = image


def _draw_canal(canvas, canal, l1, tissue):
    """The dural sac: bright fluid, the cord down to L1, below it the roots of the cauda equina towards the back."""
    y = np.arange(canvas.image.shape[1]) * canvas.spacing_mm[1]
    middle = _along(canal, y)[0]
    box = canvas.box((0, middle.min() - 16), (y[-1], middle.max() + 16))
    y, x, z = canvas.coordinates(box)
    middle, depth, canal_z, cosine = _along(canal, y)
    back, side = (x - middle) * cosine, z - canal_z
    inside = depth * (1 - np.hypot(back / depth, side / ANATOMY.canal_half_width_mm))
    _paint(canvas, box, canvas.cover(inside + 1.2), tissue["dark"])
    roots = np.clip(0.9 * back / depth + 0.1 + 0.35 * canvas.textures[2][box], 0, 1) * np.clip((depth - 4) / 2, 0, 1)
    _paint(canvas, box, canvas.cover(inside), tissue["csf"] * (1 - 0.4 * roots))
    conus = l1.centre[0]
    cord_radius = 3.9 * np.clip((conus + 8 - y) / 25, 0, 1)
    _paint(canvas, box, canvas.cover(cord_radius - np.hypot(back + 0.8, side)), tissue["cord"])
    canvas.mask[box][inside > 0] = CANAL_LABEL


def _local(canvas, body, reach=(0.0, 0.0)):
    """A box around a body, and in it the body's own coordinates: u to the back, v to the feet, w to the left, in mm.

    `reach` widens the box (to the feet, to the back), for what hangs on the body.
    """
    margin = np.hypot(body.half_height, max(body.half_depth)) + 4
    low, high = body.centre[:2] - margin, body.centre[:2] + margin + np.array(reach)
    box = canvas.box(low - [reach[0] / 2, 0], high)
    return box, *_frame(body, *canvas.coordinates(box))


def _frame(body, y, x, z):
    back, down = (axis.tolist() for axis in body.axes)  # Python floats leave float32 arrays as they are
    centre = body.centre.tolist()
    w = z - centre[2]
    y, x = y - centre[0] - float(body.shear[0]) * w, x - centre[1] - float(body.shear[1]) * w
    return y * back[0] + x * back[1], y * down[0] + x * down[1], w


def _depths(body, u, v, w):
    """Depth in mm under a body's upper endplate, lower endplate and wall, negative outside; radius, 1 at the wall."""
    half_height = body.half_height - body.slope * u
    half_depth = np.mean(body.half_depth)
    dome = np.clip(1 - (u / half_depth) ** 2, 0, 1) * np.clip(1 - (w / body.half_width) ** 2, 0, 1)
    under_upper = v + half_height - ANATOMY.concavity_mm * dome
    over_lower = half_height - v - ANATOMY.concavity_mm * dome
    part = np.clip(0.5 + v / (2 * half_height), 0, 1)
    wall = body.half_depth[0] * (1 - part) + body.half_depth[1] * part - 4 * ANATOMY.waist_mm * part * (1 - part)
    radius = ((np.abs(u) / wall) ** 2.5 + (np.abs(w) / body.half_width) ** 2.5) ** 0.4
    return under_upper, over_lower, (1 - radius) * half_depth, radius


def _disc_grade(grades, k, name):
    """The true grade of disc k; T11-T12 carries no grade and is drawn like its neighbour."""
    return int(grades[np.clip(k, 0, 5), _index(name)])


def _draw_disc(rng, canvas, upper, lower, k, grades, tissue):
    """Fill the gap between two bodies: annulus, nucleus by Pfirrmann grade, and now and then a fissure."""
    joint = (
        upper.centre
        + upper.half_height * np.append(upper.axes[1], 0)
        + lower.centre
        - lower.half_height * np.append(lower.axes[1], 0)
    ) / 2
    margin = max(upper.half_depth[1], lower.half_depth[0]) + 5
    box = canvas.box(joint[:2] - margin, joint[:2] + margin)
    coordinates = canvas.coordinates(box)
    above, below = (_frame(body, *coordinates) for body in (upper, lower))
    below_upper, above_lower = -_depths(upper, *above)[1], -_depths(lower, *below)[0]
    part = np.clip(below_upper / np.maximum(below_upper + above_lower, 0.1), 0, 1)
    u = above[0] * (1 - part) / upper.half_depth[1] + below[0] * part / lower.half_depth[0]
    w = (coordinates[2] - joint[2]) / ((upper.half_width + lower.half_width) / 2)
    radius = (np.abs(u) ** 2.5 + np.abs(w) ** 2.5) ** 0.4
    bulge = 1.0 + 0.02 * _disc_grade(grades, k, "narrowing") * (0 <= k <= 5) + rng.uniform(-0.02, 0.03)
    inside = np.minimum(np.minimum(below_upper, above_lower), (bulge - radius) * upper.half_depth[1])

    grade = _disc_grade(grades, k, "pfirrmann") if k <= 5 else 4
    nucleus, annulus, softness, roughness = NUCLEUS[grade]
    height = 2 * part - 1
    centre = rng.uniform(0.0, 0.12)
    to_edge = 1 - np.sqrt(((u - centre) / 0.66) ** 2 + (height / 0.95) ** 4 + (w / 0.75) ** 2)
    core = np.clip(0.5 + to_edge / (2 * softness), 0, 1)
    fibres = annulus * (1 - 0.6 * np.clip((radius - 0.75) / 0.25, 0, 1))
    value = fibres + (nucleus - fibres) * core * core * (3 - 2 * core)
    if grade == 1:
        cleft = np.clip(1.3 - np.abs(height + rng.uniform(-0.08, 0.08)) / 0.2, 0, 1)
        value = value - 0.9 * cleft * np.clip((0.6 - np.abs(u - centre)) / 0.1, 0, 1) * core
    signal = tissue["disc"] * np.exp(rng.normal(0, 0.10))
    coarse, fine, _ = canvas.textures
    value = value * (1 + roughness * np.clip(0.9 * fine[box] + 0.5 * coarse[box], -2, 2))
    if grade > 0 and rng.random() < 0.15:  # a fissure: bright fluid in the annulus, of no account to any grade
        spot = ((u - rng.choice([-0.85, 0.85])) / 0.08) ** 2 + (height / 0.5) ** 2 + (w / 0.25) ** 2
        value = value + 0.9 * np.exp(-spot)
    _paint(canvas, box, canvas.cover(inside + 1.0), tissue["dark"])
    _paint(canvas, box, canvas.cover(inside), signal * np.maximum(value, 0.08))
    if 0 <= k <= 5:
        canvas.mask[box][inside > 0] = LOWEST_DISC_LABEL + 5 - k


def _draw_vertebra(rng, canvas, body, k, marrow, sides, grades, tissue):
    """One vertebra: its marrow with veins and lesions, its dark rim, and its arch and spinous process."""
    box, u, v, w = _local(canvas, body, reach=(14.0, 52.0) if k <= 5 else (0.0, 0.0))
    under_upper, over_lower, under_wall, _ = _depths(body, u, v, w)
    inside = np.minimum(np.minimum(under_upper, over_lower), under_wall)
    coarse, fine, _ = canvas.textures
    value = marrow * (1 + tissue["heterogeneity"] * (coarse[box] + 0.6 * fine[box]))

    reach = body.half_depth[0]
    if rng.random() < 0.7:  # the basivertebral vein
        vein = np.exp(-((v / 1.8) ** 2) - (w / 5) ** 2) * np.clip((u - 0.45 * reach) / 4, 0, 1)
        value = value + rng.uniform(0.2, 0.6) * marrow * vein
    if rng.random() < 0.2:  # a haemangioma, harmless and away from the endplates
        at = rng.uniform(-0.5, 0.5, 3) * (reach, 0.25 * body.half_height, 0.6 * body.half_width)
        size = rng.uniform(2.5, 4.5)
        distance = np.sqrt((u - at[0]) ** 2 + (v - at[1]) ** 2 + (w - at[2]) ** 2)
        value = value + rng.uniform(0.4, 0.8) * marrow * canvas.cover((size - distance) / 2)
    for task, side, depth in _surfaces(k, sides, under_upper, over_lower, grades, "marrow"):
        at = _place(rng, canvas, body, side)
        value = value + marrow * _marrow_change(rng, canvas, box, (u - at[0], depth, w - at[1]), inside, task)

    rim = canvas.cover(inside - rng.uniform(0.7, 1.1))
    beside = np.minimum(np.minimum(under_upper, over_lower) + 0.4, under_wall + 1.3)
    _paint(canvas, box, canvas.cover(beside), tissue["dark"])
    _paint(canvas, box, canvas.cover(inside), tissue["dark"] + rim * (value - tissue["dark"]))
    if k > 5:
        return
    arch = _arch(body, u, v, w)
    marrow_of_arch = 0.9 * marrow * (1 + 1.5 * tissue["heterogeneity"] * coarse[box])
    _paint(canvas, box, canvas.cover(arch) * (inside < 0), tissue["dark"])
    _paint(canvas, box, canvas.cover(arch - 0.9) * (inside < 0), marrow_of_arch)
    if k >= 0:
        canvas.mask[box][(inside > 0) | ((arch > 0) & (canvas.mask[box] < LOWEST_DISC_LABEL))] = 6 - k


def _arch(body, u, v, w):
    """Depth in mm inside the pedicles, laminae, joints and spinous process: rounded bricks, paired by mirroring."""
    reach, side = np.mean(body.half_depth), np.abs(w)
    sag = v - 0.25 * (u - reach - 33)  # the spinous process hangs down
    bricks = (
        ((u - reach - 34) / 16, (sag - 8) / 10, w / 5, 5.0),
        ((u - reach - 20) / 3.2, (v - 7) / 9.5, (side - 8) / 7, 3.2),
        ((u - reach - 5) / 10, (v + 4) / 5.5, (side - 15) / 3.8, 3.8),
        ((u - reach - 14) / 6, (v - 6) / 13, (side - 18) / 4.5, 4.5),
    )
    depth = np.float32(-np.inf)
    for a, b, c, size in bricks:
        square = a * a
        depth = np.maximum(depth, size * (1 - np.sqrt(np.sqrt(square * square + (b * b) ** 2 + (c * c) ** 2))))
    return depth


def _surfaces(k, sides, under_upper, over_lower, grades, kind):
    """The endplates of body k that carry a lesion of a kind: task index, which half of it, depth beneath the endplate.

    A body's upper surface is the lower endplate of the disc above it, and its lower surface the upper endplate of the
    disc below.
    """
    surfaces = ((k - 1, "lower", sides[0], under_upper), (k, "upper", sides[1], over_lower))
    return [
        (_index(f"{name}_{kind}"), side, depth)
        for disc, name, side, depth in surfaces
        if 0 <= disc <= 5 and grades[disc, _index(f"{name}_{kind}")]
    ]


def _place(rng, canvas, body, side):
    """Where on an endplate a lesion sits, (u, w) in mm.

    A marrow change and a node of one endplate get opposite halves, front and back, so that neither hides the other.
    Both lie within three slices of the middle, where the nine slices that the network sees surely hold them.
    """
    aside_mm = min(0.4 * body.half_width, 3 * canvas.spacing_mm[0])
    return side * rng.uniform(0.18, 0.58) * np.mean(body.half_depth), rng.uniform(-1, 1) * aside_mm


def _marrow_change(rng, canvas, box, point, inside, task):
    """Fatty (brighter) or sclerotic (darker) marrow: relative change of signal in a soft half-ellipsoid.

    Through the slices it reaches 1.4 slice spacings to either side, so that two slices or more show it.
    """
    size = rng.uniform(14, 24) / 2, rng.uniform(7, 11), max(rng.uniform(12, 18), 1.4 * canvas.spacing_mm[0])
    change = np.clip((1.15 - _radius(point, size)) / 0.5, 0, 1)
    canvas.lesions[box][(change > 0.2) & (inside > 0)] |= 1 << task
    return change * (rng.uniform(0.55, 0.9) if rng.random() < 0.7 else -rng.uniform(0.45, 0.58))


def _radius(point, size):
    """Distance from the middle of an ellipsoid of these half axes; 1 on its surface."""
    return np.sqrt(sum((p / s) ** 2 for p, s in zip(point, size, strict=True)))


def _draw_nodes(rng, canvas, body, k, sides, grades, tissue):
    """Schmorl's nodes: one or two pockets of disc matter, open to the disc and walled off by sclerosis.

    They are drawn over the marrow, so the marrow's lesion bits give way to theirs.
    """
    if not 0 <= k <= 6:
        return
    box, u, v, w = _local(canvas, body)
    under_upper, over_lower, under_wall, _ = _depths(body, u, v, w)
    inside = np.minimum(np.minimum(under_upper, over_lower), under_wall)
    for task, side, depth in _surfaces(k, sides, under_upper, over_lower, grades, "endplate"):
        disc = k - 1 if depth is under_upper else k
        matter = tissue["disc"] * np.clip(NUCLEUS[_disc_grade(grades, disc, "pfirrmann")][0], 0.4, 1.6)
        for _ in range(rng.integers(1, 3)):
            at = _place(rng, canvas, body, side)
            size = rng.uniform(7, 11) / 2, rng.uniform(4.5, 7), max(rng.uniform(8, 12), 1.4 * canvas.spacing_mm[0])
            within = (1 - _radius((u - at[0], depth, w - at[1]), size)) * min(size[:2])
            _paint(canvas, box, canvas.cover(within + NODE_WALL_MM) * canvas.cover(inside), 1.5 * tissue["dark"])
            pocket = canvas.cover(within) * canvas.cover(depth + 1.2) * canvas.cover(under_wall - 1)
            _paint(canvas, box, pocket, matter)
            node = (within > -NODE_WALL_MM) & (inside > 0)
            lesions = canvas.lesions[box]
            lesions[node] = lesions[node] & ~_MARROW_BITS | 1 << task


def _acquire(rng, canvas):
    """float32[S, H, W]: what the scanner makes of it: contrast curve, coil shading, Rician noise."""
    shape, spacing = canvas.image.shape, canvas.spacing_mm
    signal = np.clip(canvas.image, 0, 1.3) ** np.float32(rng.uniform(0.88, 1.12))
    y, x, _ = canvas.coordinates()
    reach_mm, fade_mm = rng.uniform(160, 400), rng.uniform(10, 25)
    coil = np.exp((x - 0.7 * x.max()) / reach_mm) / (1 + np.exp(-np.minimum(y, y.max() - y) / fade_mm))
    shading = np.exp(0.10 * _texture(rng, shape, spacing, 80.0))
    signal = signal * (1.6 * coil).astype(np.float32) * shading
    noise = np.float32(rng.uniform(0.012, 0.035))
    real = signal + noise * rng.standard_normal(shape, dtype=np.float32)
    return rng.uniform(350, 1300) * np.hypot(real, noise * rng.standard_normal(shape, dtype=np.float32))


def _affine(rng, canvas):
    """float64[4, 4]: (row, column, slice, 1) → LPS mm, the scan a few degrees off the patient's axes."""
    directions = np.array([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 0.0]])
    for axis, angle in enumerate(np.deg2rad(rng.normal(0, 3, 3))):
        turn, (i, j) = np.eye(3), [n for n in range(3) if n != axis]
        turn[i, i], turn[i, j], turn[j, i], turn[j, j] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
        directions = turn @ directions
    slice_mm, row_mm, column_mm = canvas.spacing_mm
    affine = np.eye(4)
    affine[:3, :3] = directions * (row_mm, column_mm, slice_mm)
    shape = np.array(canvas.image.shape)[[1, 2, 0]]
    affine[:3, 3] = rng.normal(0, 20, 3) - affine[:3, :3] @ ((shape - 1) / 2)
    return affine
