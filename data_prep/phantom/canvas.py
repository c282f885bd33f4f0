"""The canvas that a phantom is drawn on, with random textures; and the scanner's effects on the drawn phantom.

A canvas has slices first, (S, H, W), so that numpy's inner loop runs over a whole row. Coordinates are (y, x, z) in mm
from its first voxel, as in `spine`.
"""

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Float32, UInt8, UInt16
from scipy import sparse

from data_prep.phantom.spine import Body


@dataclass(frozen=True, eq=False)
class Canvas:
    """A phantom that is being drawn. Drawing changes its arrays in place."""

    image: Float32[np.ndarray, "S H W"]  # signal, about 1 in CSF
    mask: UInt8[np.ndarray, "S H W"]  # structures, by `Phantom`'s labels
    lesions: UInt16[np.ndarray, "S H W"]  # bit k is set inside a lesion of task k
    spacing_mm: Float[np.ndarray, "3"]
    textures: tuple[np.ndarray, np.ndarray, np.ndarray]  # noise of unit variance: coarse, fine, fibrous

    def coordinates(self, box=(slice(None),) * 3):
        """The coordinates y, x, z (mm) of a box's pixels, as arrays that broadcast to its shape."""
        z, y, x = (
            np.arange(n, dtype=np.float32)[s] * np.float32(d)
            for n, s, d in zip(self.image.shape, box, self.spacing_mm, strict=True)
        )
        return y[None, :, None], x[None, None, :], z[:, None, None]

    def box(self, low, high):
        """Convert a box from mm, (y, x) of its corners, to array indices. It spans all slices of the scan."""
        starts = np.floor(np.array(low) / self.spacing_mm[1:]).astype(int)
        stops = np.ceil(np.array(high) / self.spacing_mm[1:]).astype(int) + 1
        return (slice(None), *(slice(max(0, a), max(0, b)) for a, b in zip(starts, stops, strict=True)))

    def cover(self, inside_mm):
        """The fraction of each pixel that is inside an outline (partial volume), from the signed distance to it."""
        return np.clip(0.5 + inside_mm / float(self.spacing_mm[1:].mean()), 0, 1)

    def paint(self, box, cover, value):
        """Blend a value into a box, in proportion to the cover of each pixel."""
        self.image[box] += (cover * (value - self.image[box])).astype(np.float32)


def place_on_canvas(rng: np.random.Generator, bodies: list[Body]) -> tuple[Canvas, list[Body]]:
    """Make an empty canvas, and move the bodies onto it, off-centre. Its upper edge always cuts the topmost."""
    slice_mm = float(np.clip(np.exp(rng.normal(np.log(4.0), 0.22)), 2.6, 6.0))
    row_mm = rng.uniform(0.70, 0.88)
    spacing_mm = np.array([slice_mm, row_mm, row_mm * rng.choice([1.0, 1.0, rng.uniform(0.97, 1.03)])])
    num_slices = int(np.clip(round(rng.uniform(56, 68) / slice_mm), 11, 17))
    named = {body.name: body for body in bodies}
    top = bodies[1].corners[:, 0].min() - rng.uniform(10, 22)
    bottom = named["S1"].corners[:, 0].max() + rng.uniform(12, 40)
    width_mm = rng.uniform(200, 235)
    left = named["L3"].centre[1] - rng.uniform(0.42, 0.55) * width_mm
    middle_z = (num_slices - 1) / 2 * slice_mm + rng.uniform(-1, 1) * min(5.0, 1.2 * slice_mm)
    shift = np.array([-top, -left, middle_z])
    shape = (num_slices, *np.ceil(np.array([bottom - top, width_mm]) / spacing_mm[1:]).astype(int))
    coarse, fine, fibres = (_texture(rng, shape, spacing_mm, grain_mm) for grain_mm in (9.0, 3.0, (6.0, 9.0, 2.0)))
    image, mask, lesions = (np.zeros(shape, dtype) for dtype in (np.float32, np.uint8, np.uint16))
    canvas = Canvas(image, mask, lesions, spacing_mm, (coarse, fine, fibres))
    return canvas, [replace(body, centre=body.centre + shift) for body in bodies]


def _texture(rng, shape, spacing_mm, grain_mm) -> Float32[np.ndarray, "S H W"]:
    """Smooth noise of unit variance. `grain_mm` is the spacing of its nodes: one number, or one per axis."""
    grains_mm = np.broadcast_to(grain_mm, 3)
    weights = [
        _spline_weights(rng.random() + np.arange(n) * d / g)
        for n, d, g in zip(shape, spacing_mm, grains_mm, strict=True)
    ]
    field = rng.standard_normal([axis.shape[1] for axis in weights], dtype=np.float32)
    for axis in (2, 1, 0):
        nodes = np.moveaxis(field, axis, 0)
        spread = weights[axis] @ nodes.reshape(len(nodes), -1)
        field = np.moveaxis(spread.reshape(-1, *nodes.shape[1:]), 0, axis)
    return np.ascontiguousarray(field / field.std())


def _spline_weights(position):
    """Cubic B-spline weights, (n, nodes). With linear weights the grid of nodes would be visible.

    They are sparse because a sparse product runs on one thread, so its bits do not depend on the number of cores.
    """
    distance = np.abs(position[:, None] - np.arange(-1, int(position[-1]) + 3))
    near = 2 / 3 - distance**2 + distance**3 / 2
    weights = np.where(distance < 1, near, np.clip(2 - distance, 0, None) ** 3 / 6)
    return sparse.csr_array(weights.astype(np.float32))


def place_in_patient(rng: np.random.Generator, canvas: Canvas) -> Float[np.ndarray, "4 4"]:
    """A random affine, (row, column, slice, 1) → LPS mm, a few degrees off the patient's axes."""
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


def acquire(rng: np.random.Generator, canvas: Canvas) -> Float32[np.ndarray, "S H W"]:
    """The image after the scanner's effects: contrast curve, coil shading, Rician noise."""
    shape, spacing_mm = canvas.image.shape, canvas.spacing_mm
    signal = np.clip(canvas.image, 0, 1.3) ** np.float32(rng.uniform(0.88, 1.12))
    y, x, _ = canvas.coordinates()
    reach_mm, fade_mm = rng.uniform(160, 400), rng.uniform(10, 25)
    coil = np.exp((x - 0.7 * x.max()) / reach_mm) / (1 + np.exp(-np.minimum(y, y.max() - y) / fade_mm))
    shading = np.exp(0.10 * _texture(rng, shape, spacing_mm, 80.0))
    signal = signal * (1.6 * coil).astype(np.float32) * shading
    noise = np.float32(rng.uniform(0.012, 0.035))
    real = signal + noise * rng.standard_normal(shape, dtype=np.float32)
    return rng.uniform(350, 1300) * np.hypot(real, noise * rng.standard_normal(shape, dtype=np.float32))
