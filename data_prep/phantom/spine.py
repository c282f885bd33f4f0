"""The geometry of a phantom's spine: vertebral bodies stacked in a curve, and the canal behind them.

Lengths are in mm. Coordinates are (y, x, z): y down, x to the patient's back, z to the left.
"""

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int
from scipy.interpolate import PchipInterpolator

BODIES = ("T12", "L1", "L2", "L3", "L4", "L5", "S1")  # next to a graded disc; a phantom's truth has their corners
SACRUM = ("S1", "S2", "S3")
CANAL_HALF_WIDTH_MM = 11.0  # half the width of the dural sac from side to side

# Sizes of an average adult. Tuples run from the top down: bodies T11 … S1, discs T11-T12 … L5-S1.
_BODY_HEIGHT_MM = (25.0, 25.0, 26.0, 27.0, 27.5, 27.5, 27.5, 28.0)
_BODY_HALF_DEPTH_MM = (15.2, 15.2, 15.8, 16.4, 16.9, 17.3, 17.4, 17.2)
_BODY_HALF_WIDTH_MM = (21.0, 21.0, 22.0, 23.0, 24.0, 25.0, 26.0, 27.0)
_BODY_WEDGE_DEG = (-3.0, -3.0, -2.0, 0.0, 1.0, 2.0, 7.0, 2.0)
_DISC_HEIGHT_MM = (7.0, 8.3, 8.8, 9.3, 9.8, 10.2, 9.8)
_DISC_WEDGE_DEG = (1.0, 2.0, 3.0, 5.0, 6.0, 9.0, 11.0)
_HEIGHT_BY_NARROWING = (1.0, 0.76, 0.55, 0.34)
_CONCAVITY_MM = 0.9
_WAIST_MM = 1.7
_CANAL_HALF_DEPTH_MM = 7.5
_SACRAL_HALF_DEPTH_MM = {"S1": 6.375, "S2": 3.75, "S3": 2.25}  # the sac tapers in the sacrum
_CANAL_BEHIND_BODY_MM = 8.6 - 7.5  # from the posterior wall to the front of the canal


@dataclass(frozen=True, eq=False)
class Body:
    """A vertebral body. Its outline in the sagittal plane is a quadrilateral with concave sides.

    Scoliosis is modelled as a shear: unlike a rotation, it keeps the mid-sagittal outline in one slice.
    """

    name: str
    centre: Float[np.ndarray, "3"]
    angle_deg: float  # above 0 its back is higher than its front
    wedge_deg: float  # angle between the endplates; above 0 the front is taller
    half_height: float
    half_depth: tuple[float, float]  # half the length of the upper and of the lower endplate
    half_width: float
    shear: tuple[float, float] = (0.0, 0.0)  # shift of (y, x) per mm of z
    sunk_mm: float = 0.0  # depth of both endplates' middles below those of a healthy body
    slip_mm: float = 0.0  # forward on the body below, beyond a healthy spine's; the disc then stays on that body

    @property
    def axes(self):
        """Unit vectors (y, x) towards the back and towards the feet."""
        sin, cos = np.sin(np.deg2rad(self.angle_deg)), np.cos(np.deg2rad(self.angle_deg))
        return np.array([-sin, cos]), np.array([cos, sin])

    @property
    def slope(self):
        """Decrease of half the height per mm towards the back."""
        return np.tan(np.deg2rad(self.wedge_deg / 2))

    @property
    def top(self):
        """(y, x) of the middle of the upper endplate."""
        return self.centre[:2] - self.half_height * self.axes[1]

    @property
    def bottom(self):
        """(y, x) of the middle of the lower endplate."""
        return self.centre[:2] + self.half_height * self.axes[1]

    @property
    def corners(self) -> Float[np.ndarray, "4 2"]:
        """(y, x): upper anterior, upper posterior, lower posterior, lower anterior."""
        back, down = self.axes
        upper, lower = self.half_depth
        along = np.array([-upper, upper, lower, -lower])
        below = np.array([-1, -1, 1, 1]) * (self.half_height - self.slope * along)
        return self.centre[:2] + along[:, None] * back + below[:, None] * down

    def frame(self, y, x, z):
        """Convert points to coordinates from the body's centre: u to its back, v to its feet, w to the left."""
        back, down = (axis.tolist() for axis in self.axes)  # with Python floats, float32 arrays stay float32
        centre = self.centre.tolist()
        w = z - centre[2]
        y, x = y - centre[0] - float(self.shear[0]) * w, x - centre[1] - float(self.shear[1]) * w
        return y * back[0] + x * back[1], y * down[0] + x * down[1], w

    def depths(self, u, v, w):
        """Depth of points u, v, w under the upper endplate, the lower endplate and the wall; negative outside."""
        half_height = self.half_height - self.slope * u
        half_depth = np.mean(self.half_depth)
        dome = np.clip(1 - (u / half_depth) ** 2, 0, 1) * np.clip(1 - (w / self.half_width) ** 2, 0, 1)
        hollow = (_CONCAVITY_MM + self.sunk_mm) * dome
        under_upper = v + half_height - hollow
        over_lower = half_height - v - hollow
        part = np.clip(0.5 + v / (2 * half_height), 0, 1)
        wall = self.half_depth[0] * (1 - part) + self.half_depth[1] * part - 4 * _WAIST_MM * part * (1 - part)
        radius = ((np.abs(u) / wall) ** 2.5 + (np.abs(w) / self.half_width) ** 2.5) ** 0.4
        return under_upper, over_lower, (1 - radius) * half_depth


def stack_spine(rng: np.random.Generator, narrowing: Int[np.ndarray, "6"]) -> list[Body]:
    """Stack ten bodies, T11 … S3, upwards from the sacrum; rotate them nearly upright and bend them sideways.

    `narrowing` has the grades from T12-L1 down. A narrowed disc is lower and has a smaller wedge angle, because a
    degenerated spine has less lordosis.
    """
    size, lordosis = rng.uniform(0.92, 1.08), rng.uniform(0.7, 1.4)
    relative_height = np.append(1.0, np.array(_HEIGHT_BY_NARROWING)[narrowing] * np.exp(rng.normal(0, 0.035, 6)))
    disc_height = size * (relative_height * _DISC_HEIGHT_MM)
    disc_wedge = lordosis * (relative_height * _DISC_WEDGE_DEG)
    heights = size * np.array(_BODY_HEIGHT_MM) * rng.normal(1, 0.025, 8)
    wedges = np.array(_BODY_WEDGE_DEG) + rng.normal(0, 1.0, 8)
    depths = size * np.array(_BODY_HALF_DEPTH_MM) * rng.normal(1, 0.015, 8)
    widths = size * np.array(_BODY_HALF_WIDTH_MM)

    stacked: list[Body] = []
    lower_end, angle = np.zeros(2), 0.0  # the middle of the next body's lower endplate, and that endplate's angle
    for k, name in reversed(list(enumerate(("T11", *BODIES)))):
        lower_depth = 0.68 * depths[k] if name == "S1" else depths[k] * rng.normal(1.0, 0.012)
        half_height, tilt = heights[k] / 2, angle - wedges[k] / 2
        body = Body(name, np.zeros(3), tilt, wedges[k], half_height, (depths[k], lower_depth), widths[k])
        body = replace(body, centre=np.append(lower_end - half_height * body.axes[1], 0.0))
        stacked.insert(0, body)
        if k:
            upper_angle = angle - wedges[k]
            angle = upper_angle - disc_wedge[k - 1]
            between = np.deg2rad((upper_angle + angle) / 2)
            slip = rng.normal(0, 0.6) * np.array([-np.sin(between), np.cos(between)])
            lower_end = body.top + slip - disc_height[k - 1] * np.array([np.cos(between), np.sin(between)])
    bodies = stacked + _lower_sacrum(stacked[-1], size)
    turn_deg = rng.normal(0, 4.0) - np.mean([body.angle_deg for body in bodies[2:6]])
    return _bend_sideways(rng, [turned(body, np.clip(turn_deg, -60, 60)) for body in bodies])


def _lower_sacrum(s1, size):
    """S2 and S3, with a disc remnant above each."""
    bodies = [s1]
    for name, height, upper, lower, turn in (("S2", 23.0, 11.0, 9.0, 3.0), ("S3", 20.0, 8.5, 7.0, -12.0)):
        above = bodies[-1]
        body = replace(
            above,
            name=name,
            angle_deg=above.angle_deg + turn,
            half_height=size * height / 2,
            half_depth=(size * upper, size * lower),
            wedge_deg=0.0,
            half_width=0.85 * above.half_width,
        )
        joint = above.centre[:2] + (above.half_height + 1.2) * above.axes[1]
        bodies.append(replace(body, centre=np.append(joint + (body.half_height + 1.2) * body.axes[1], 0.0)))
    return bodies[1:]


def turned(body: Body, angle_deg: float) -> Body:
    """Rotate a body about the origin of the sagittal plane."""
    sin, cos = np.sin(np.deg2rad(angle_deg)), np.cos(np.deg2rad(angle_deg))
    y, x, z = body.centre
    centre = np.array([cos * y - sin * x, sin * y + cos * x, z])
    return replace(body, centre=centre, angle_deg=body.angle_deg + angle_deg)


def _bend_sideways(rng, bodies):
    """Add a mild scoliosis: the bodies follow a sine wave sideways, tilt with its slope and turn about their axes."""
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
class Canal:
    """The canal as smooth functions of y: its middle (x, z) and its half depth."""

    y: Float[np.ndarray, "N"]  # where it passes behind each body, from the top down
    course: PchipInterpolator

    @classmethod
    def behind(cls, bodies: list[Body]) -> "Canal":
        """The canal behind the bodies, from the top down to S3."""
        half_depths = [_SACRAL_HALF_DEPTH_MM.get(body.name, _CANAL_HALF_DEPTH_MM) for body in bodies]
        points = []
        for body, half_depth in zip(bodies, half_depths, strict=True):
            behind = np.mean(body.half_depth) - _WAIST_MM + _CANAL_BEHIND_BODY_MM + half_depth
            points.append(body.centre[:2] + behind * body.axes[0])
        y, x = np.array(points).T
        y = np.maximum.accumulate(y + np.arange(len(y)) * 1e-3)  # the interpolator needs increasing y
        z = [body.centre[2] for body in bodies]
        return cls(y, PchipInterpolator(y, np.column_stack([x, half_depths, z])))

    def along(self, y):
        """Its x, half depth and z at y, and the cosine of its angle to the y axis. It is straight beyond its ends."""
        inside = np.clip(y, self.y[0], self.y[-1])
        middle, slope = self.course(inside), self.course(inside, 1)
        x, depth, z = (middle[..., i].astype(np.float32) for i in range(3))
        return x + slope[..., 0] * (y - inside), depth, z, 1 / np.sqrt(1 + slope[..., 0] ** 2)
