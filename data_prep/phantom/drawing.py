"""How a phantom is drawn: tissues around the spine, discs, vertebrae and their lesions, from the back to the front.

Only what a rater would look at depends on the true grades. All else is nuisance: contrast between tissues, marrow
texture, veins, haemangiomas, annular fissures. In a body, u runs to the back, v to the feet and w to the left, in mm
from its centre; in a disc, u and w are ±1 at its edge.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from data_prep.phantom.canvas import Canvas
from data_prep.phantom.spine import CANAL_HALF_WIDTH_MM, SACRUM, Body, Canal
from spinejax.tasks import PAPER_TASKS

CANAL_LABEL = 100
DISC_BELOW = 200  # the disc below a vertebra has its label plus this
LESION_BITS = {task.name: np.uint16(1 << k) for k, task in enumerate(PAPER_TASKS)}

# By Pfirrmann grade: nucleus and annulus against marrow, softness of their border, inhomogeneity. Grades 1 and 2 differ
# in little but the cleft, and contrast varies between scans by nearly as much as a grade: structure has to decide.
NUCLEUS = (
    (1.75, 0.30, 0.12, 0.03),
    (1.62, 0.30, 0.15, 0.06),
    (1.02, 0.48, 0.45, 0.24),
    (0.60, 0.38, 0.70, 0.14),
    (0.26, 0.22, 0.70, 0.35),
)

NODE_WALL_MM = 1.6


@dataclass(frozen=True)
class Tissue:
    """The signals of one scan's tissues; `disc` is the signal of a disc as bright as marrow."""

    csf: float
    cord: float
    fat: float
    muscle: float
    dark: float
    marrow: float
    disc: float
    heterogeneity: float


def vertebra_labels(bodies: list[Body]) -> dict[str, int]:
    """SPIDER's labels by name: counted upwards from the sacrum. The topmost body, cut by the image, has none."""
    mobile = [body.name for body in bodies[1:] if body.name not in SACRUM]
    return {name: len(mobile) - k for k, name in enumerate(mobile)}


def draw(
    rng: np.random.Generator,
    canvas: Canvas,
    bodies: list[Body],
    grades: dict[str, dict[str, int]],
    tissue: Tissue,
    age: float,
) -> None:
    """Fill an empty canvas: image, mask and lesions.

    `grades` are level → task name → true grade, for the six discs from T12-L1 down and, if they are to differ from the
    usual, for others. Age, a standard normal deviate, makes marrow and muscle fatty.
    """
    labels = vertebra_labels(bodies)
    canal = Canal.behind(bodies)
    _draw_surroundings(rng, canvas, canal, tissue, age)
    _draw_canal(canvas, canal, bodies[2].centre[0], tissue)

    # Discs above T12 have no grade and are drawn like T12-L1; between sacral bodies there are black remnants.
    thoracic, remnant = grades["T12-L1"] | {"narrowing": 0}, {"pfirrmann": 4, "narrowing": 0}
    discs = {"T10-T11": thoracic, "T11-T12": thoracic, "S1-S2": remnant, "S2-S3": remnant} | grades
    marrow = tissue.marrow * np.exp(rng.normal(0, 0.06, len(bodies)))
    sides = rng.choice([-1, 1], (len(bodies), 2))  # the half of a body's upper and lower endplate with a lesion
    for upper, lower in pairwise(bodies):
        _draw_disc(rng, canvas, upper, lower, discs, labels, tissue)
    for k, body in enumerate(bodies):
        _draw_vertebra(rng, canvas, body, marrow[k], sides[k], grades, labels, tissue)
    for k, body in enumerate(bodies):
        _draw_nodes(rng, canvas, body, -sides[k], grades, tissue)


def choose_tissue(rng: np.random.Generator, age: float) -> Tissue:
    """A T2 scan's tissues. Marrow turns to fat with age, and sequences differ in contrast."""
    marrow = float(np.clip(0.44 * np.exp(0.07 * age + rng.normal(0, 0.13)), 0.28, 0.6))
    return Tissue(
        csf=rng.uniform(0.95, 1.15),
        cord=rng.uniform(0.40, 0.55),
        fat=rng.uniform(0.65, 0.85),
        muscle=rng.uniform(0.12, 0.22),
        dark=rng.uniform(0.03, 0.07),
        marrow=marrow,
        disc=marrow * np.exp(rng.normal(0, 0.18)),
        heterogeneity=rng.uniform(0.03, 0.09),
    )


def _draw_surroundings(rng, canvas, canal, tissue, age):
    """Everything but the spine: fatty back muscle, psoas, foraminal fat, vessels, bowel, skin and the air behind it."""
    coarse, fine, fibres = canvas.textures
    y, x, z = canvas.coordinates()
    middle, _, canal_z, _ = (np.float32(value) for value in canal.along(y))
    behind = x - middle
    aside = np.abs(z - canal_z)
    blobs = np.clip(1.5 * coarse + 0.4 * fine, -1.5, 1.5)

    streaks = np.clip(0.3 + 0.12 * age + 0.45 * fibres + 0.15 * coarse - 0.2 * np.clip((aside - 4) / 4, 0, 1), 0, 1)
    image = tissue.muscle + 0.7 * (tissue.fat - tissue.muscle) * streaks * streaks
    belly = tissue.fat * (0.48 + 0.27 * blobs)
    psoas = tissue.muscle * (1 + 0.12 * fibres)
    image += np.clip((-8 - behind) / 4, 0, 1) * (psoas - image)
    foramen = np.clip((8 - np.abs(behind + 2)) / 3, 0, 1) * np.clip((aside - 11) / 3, 0, 1)
    image += foramen * (tissue.fat * (0.75 + 0.12 * blobs) - image)
    front = middle - 22 - 24 * np.clip((aside - 14) / 6, 0, 1)
    image += np.clip((front - x + 2 * coarse) / 3, 0, 1) * (belly - image)
    for side, radius in ((9.0, rng.uniform(7, 10)), (-11.0, rng.uniform(7, 11))):  # aorta and vena cava, as far as L4
        from_axis = np.hypot(x - middle + 37 + radius + rng.uniform(2, 5), z - canal_z - side)
        vessel = radius - 0.8 * np.clip(y - canal.y[5], 0, 20) - from_axis
        image += canvas.cover(vessel) * (1.4 * tissue.dark - image)
    level = (y - canal.y[0]) / (canal.y[-1] - canal.y[0])
    back = middle.mean() + rng.uniform(48, 60) + 0.3 * (middle - middle.mean())
    skin = back + rng.uniform(6, 25) + rng.uniform(0, 14) * level
    septa = 1 - 0.35 * np.clip(1 - np.abs(fine + 0.3 * coarse) / 0.12, 0, 1)
    image += canvas.cover(x - back) * (1.05 * tissue.fat * septa - image)
    image *= canvas.cover(skin - x)
    canvas.image[...] = image


def _draw_canal(canvas, canal, conus_y, tissue):
    """The dural sac: bright fluid, the cord down to L1, and below it the roots of the cauda equina at the back."""
    y = np.arange(canvas.image.shape[1]) * canvas.spacing_mm[1]
    middle = canal.along(y)[0]
    box = canvas.box((0, middle.min() - 16), (y[-1], middle.max() + 16))
    y, x, z = canvas.coordinates(box)
    middle, depth, canal_z, cosine = canal.along(y)
    back, side = (x - middle) * cosine, z - canal_z
    inside = depth * (1 - np.hypot(back / depth, side / CANAL_HALF_WIDTH_MM))
    canvas.paint(box, canvas.cover(inside + 1.2), tissue.dark)
    roots = np.clip(0.9 * back / depth + 0.1 + 0.35 * canvas.textures[2][box], 0, 1) * np.clip((depth - 4) / 2, 0, 1)
    canvas.paint(box, canvas.cover(inside), tissue.csf * (1 - 0.4 * roots))
    cord_radius = 3.9 * np.clip((conus_y + 8 - y) / 25, 0, 1)
    canvas.paint(box, canvas.cover(cord_radius - np.hypot(back + 0.8, side)), tissue.cord)
    canvas.mask[box][inside > 0] = CANAL_LABEL


def _draw_disc(rng, canvas, upper, lower, grades, labels, tissue):
    """Fill the gap between two bodies: annulus, nucleus by Pfirrmann grade, and sometimes a fissure."""
    level = f"{upper.name}-{lower.name}"
    grade, narrowing = grades[level]["pfirrmann"], grades[level]["narrowing"]
    joint = (upper.bottom + lower.top) / 2
    margin = max(upper.half_depth[1], lower.half_depth[0]) + 5
    box = canvas.box(joint - margin, joint + margin)
    y, x, z = canvas.coordinates(box)
    above, below = upper.frame(y, x, z), lower.frame(y, x, z)
    below_upper, above_lower = -upper.depths(*above)[1], -lower.depths(*below)[0]
    part = np.clip(below_upper / np.maximum(below_upper + above_lower, 0.1), 0, 1)
    share = 1.0 if upper.slip_mm else part  # of the lower body, in where the disc's front and back are
    u = above[0] * (1 - share) / upper.half_depth[1] + below[0] * share / lower.half_depth[0]
    w = (z - (upper.centre[2] + lower.centre[2]) / 2) / ((upper.half_width + lower.half_width) / 2)
    radius = (np.abs(u) ** 2.5 + np.abs(w) ** 2.5) ** 0.4
    bulge = 1.0 + 0.02 * narrowing + rng.uniform(-0.02, 0.03)
    inside = np.minimum(np.minimum(below_upper, above_lower), (bulge - radius) * upper.half_depth[1])

    nucleus, annulus, softness, roughness = NUCLEUS[grade]
    height = 2 * part - 1  # -1 at the upper endplate, 1 at the lower one
    centre = rng.uniform(0.0, 0.12)
    to_edge = 1 - np.sqrt(((u - centre) / 0.66) ** 2 + (height / 0.95) ** 4 + (w / 0.75) ** 2)
    core = np.clip(0.5 + to_edge / (2 * softness), 0, 1)
    fibres = annulus * (1 - 0.6 * np.clip((radius - 0.75) / 0.25, 0, 1))
    value = fibres + (nucleus - fibres) * core * core * (3 - 2 * core)
    if grade == 1:
        cleft = np.clip(1.3 - np.abs(height + rng.uniform(-0.08, 0.08)) / 0.2, 0, 1)
        value = value - 0.9 * cleft * np.clip((0.6 - np.abs(u - centre)) / 0.1, 0, 1) * core
    signal = tissue.disc * np.exp(rng.normal(0, 0.10))
    coarse, fine, _ = canvas.textures
    value = value * (1 + roughness * np.clip(0.9 * fine[box] + 0.5 * coarse[box], -2, 2))
    if grade > 0 and rng.random() < 0.15:  # a fissure: bright fluid in the annulus, independent of the grades
        spot = ((u - rng.choice([-0.85, 0.85])) / 0.08) ** 2 + (height / 0.5) ** 2 + (w / 0.25) ** 2
        value = value + 0.9 * np.exp(-spot)
    canvas.paint(box, canvas.cover(inside + 1.0), tissue.dark)
    canvas.paint(box, canvas.cover(inside), signal * np.maximum(value, 0.08))
    if upper.name in labels:
        canvas.mask[box][inside > 0] = DISC_BELOW + labels[upper.name]


def _draw_vertebra(rng, canvas, body, marrow, sides, grades, labels, tissue):
    """One vertebra: marrow with veins and lesions, dark rim, arch and spinous process."""
    has_arch = body.name not in SACRUM
    box, u, v, w = around(canvas, body, reach=(14.0, 52.0) if has_arch else (0.0, 0.0))
    under_upper, over_lower, under_wall = body.depths(u, v, w)
    inside = np.minimum(np.minimum(under_upper, over_lower), under_wall)
    coarse, fine, _ = canvas.textures
    value = marrow * (1 + tissue.heterogeneity * (coarse[box] + 0.6 * fine[box]))

    reach = body.half_depth[0]
    if rng.random() < 0.7:  # the basivertebral vein
        vein = np.exp(-((v / 1.8) ** 2) - (w / 5) ** 2) * np.clip((u - 0.45 * reach) / 4, 0, 1)
        value = value + rng.uniform(0.2, 0.6) * marrow * vein
    if rng.random() < 0.2:  # a haemangioma, harmless and away from the endplates
        at = rng.uniform(-0.5, 0.5, 3) * (reach, 0.25 * body.half_height, 0.6 * body.half_width)
        size = rng.uniform(2.5, 4.5)
        distance = np.sqrt((u - at[0]) ** 2 + (v - at[1]) ** 2 + (w - at[2]) ** 2)
        value = value + rng.uniform(0.4, 0.8) * marrow * canvas.cover((size - distance) / 2)
    for task, end, _ in _lesions(body, grades, "marrow"):
        at = _place(rng, canvas, body, sides[end])
        point = u - at[0], (under_upper, over_lower)[end], w - at[1]
        value = value + marrow * _marrow_change(rng, canvas, box, point, inside, task)

    rim = canvas.cover(inside - rng.uniform(0.7, 1.1))
    dark_rim = np.minimum(np.minimum(under_upper, over_lower) + 0.4, under_wall + 1.3)
    canvas.paint(box, canvas.cover(dark_rim), tissue.dark)
    canvas.paint(box, canvas.cover(inside), tissue.dark + rim * (value - tissue.dark))
    if has_arch:
        arch = _arch(body, u, v, w)
        marrow_of_arch = 0.9 * marrow * (1 + 1.5 * tissue.heterogeneity * coarse[box])
        canvas.paint(box, canvas.cover(arch) * (inside < 0), tissue.dark)
        canvas.paint(box, canvas.cover(arch - 0.9) * (inside < 0), marrow_of_arch)
    else:
        canvas.mask[box][inside > 0] = 0  # the sacrum: bone without a label, and no longer canal
    if body.name in labels:
        behind = (arch > 0) & (canvas.mask[box] <= CANAL_LABEL)  # discs replace an arch
        canvas.mask[box][(inside > 0) | behind] = labels[body.name]


def around(canvas: Canvas, body: Body, reach: tuple[float, float] = (0.0, 0.0)):
    """A box around a body, and in it the body's own coordinates u, v, w.

    `reach` widens the box by mm to the feet and to the back, for the arch.
    """
    margin = np.hypot(body.half_height, max(body.half_depth)) + 4
    low, high = body.centre[:2] - margin, body.centre[:2] + margin + np.array(reach)
    box = canvas.box(low - [reach[0] / 2, 0], high)
    return box, *body.frame(*canvas.coordinates(box))


def _arch(body, u, v, w):
    """Depth in mm inside the pedicles, laminae, joints and spinous process: rounded bricks, paired by mirroring."""
    reach, side = np.mean(body.half_depth), np.abs(w)
    sag = v - 0.25 * (u - reach - 33)  # the spinous process points down
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


def _lesions(body, grades, kind):
    """A body's lesions of a kind, "marrow" or "endplate": task, upper (0) or lower (1) end, that disc's grades.

    A body's upper end is the "lower" endplate of the disc above it; its lower end is the "upper" one of the disc below.
    """
    found = []
    for level, disc in grades.items():
        above, below = level.split("-")
        if body.name == below and disc[f"lower_{kind}"]:
            found.append((f"lower_{kind}", 0, disc))
        if body.name == above and disc[f"upper_{kind}"]:
            found.append((f"upper_{kind}", 1, disc))
    return found


def _place(rng, canvas, body, side):
    """The centre of a lesion on an endplate, (u, w) in mm.

    A marrow change and a node of one endplate are in opposite halves, front and back, so that neither hides the other,
    though they may overlap. Both are within three slices of the middle, among the nine that the network sees.
    """
    aside_mm = min(0.4 * body.half_width, 3 * canvas.spacing_mm[0])
    return side * rng.uniform(0.18, 0.58) * np.mean(body.half_depth), rng.uniform(-1, 1) * aside_mm


def _marrow_change(rng, canvas, box, point, inside, task):
    """Fatty (brighter) or sclerotic (darker) marrow: relative change of signal in a soft half-ellipsoid.

    It is 14 to 24 mm long, 7 to 11 mm deep, and reaches 12 to 18 mm to either side: two slice spacings or more.
    """
    size = rng.uniform(14, 24) / 2, rng.uniform(7, 11), rng.uniform(12, 18)
    change = np.clip((1.15 - _radius(point, size)) / 0.5, 0, 1)
    canvas.lesions[box][(change > 0.2) & (inside > 0)] |= LESION_BITS[task]
    return change * (rng.uniform(0.55, 0.9) if rng.random() < 0.7 else -rng.uniform(0.45, 0.58))


def _draw_nodes(rng, canvas, body, sides, grades, tissue):
    """Schmorl's nodes: one or two pockets of disc matter, open to the disc, with a sclerotic wall.

    A pocket is 7 to 11 mm long, 4.5 to 7 mm deep, and reaches 8 to 12 mm, at least 1.4 slice spacings, to either side.
    It is drawn over the marrow, so its lesion bits replace the marrow's.
    """
    lesions = _lesions(body, grades, "endplate")
    if not lesions:
        return
    box, u, v, w = around(canvas, body)
    under_upper, over_lower, under_wall = body.depths(u, v, w)
    inside = np.minimum(np.minimum(under_upper, over_lower), under_wall)
    marrow_bits = LESION_BITS["upper_marrow"] | LESION_BITS["lower_marrow"]
    for task, end, disc in lesions:
        depth = (under_upper, over_lower)[end]
        matter = tissue.disc * np.clip(NUCLEUS[disc["pfirrmann"]][0], 0.4, 1.6)
        for _ in range(rng.integers(1, 3)):
            at = _place(rng, canvas, body, sides[end])
            size = rng.uniform(7, 11) / 2, rng.uniform(4.5, 7), max(rng.uniform(8, 12), 1.4 * canvas.spacing_mm[0])
            within = (1 - _radius((u - at[0], depth, w - at[1]), size)) * min(size[:2])
            canvas.paint(box, canvas.cover(within + NODE_WALL_MM) * canvas.cover(inside), 1.5 * tissue.dark)
            pocket = canvas.cover(within) * canvas.cover(depth + 1.2) * canvas.cover(under_wall - 1)
            canvas.paint(box, pocket, matter)
            node = (within > -NODE_WALL_MM) & (inside > 0)
            bits = canvas.lesions[box]
            bits[node] = bits[node] & ~marrow_bits | LESION_BITS[task]


def _radius(point, size):
    """Distance from the middle of an ellipsoid of these half axes; 1 on its surface."""
    return np.sqrt(sum((p / s) ** 2 for p, s in zip(point, size, strict=True)))
