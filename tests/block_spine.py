"""A spine of blocks, drawn from known corners: the simplest scan with a known truth."""

from dataclasses import dataclass

import numpy as np

from data_prep.anatomy.vertebrae import SPIDER_VERTEBRAE
from data_prep.read.scan import Scan

BODY_MM, DISC_MM, DEPTH_MM, HALF_WIDTH_MM = 26.0, 9.0, 34.0, 22.0
MARROW, DISC, CSF, FAT = 100.0, 60.0, 200.0, 20.0


@dataclass(frozen=True)
class BlockSpine:
    """A scan, its mask, and each body's true corners in voxels, S1's lower ones too."""

    scan: Scan
    mask: Scan
    corners: dict[str, np.ndarray]


def sagittal_affine(spacing_mm, angles_deg=(0.0, 0.0)) -> np.ndarray:
    """The standard axes with these spacings, turned about the left–right and then the superior–inferior axis."""
    about_x, about_z = np.deg2rad(angles_deg)
    turn_x = np.array([[1, 0, 0], [0, np.cos(about_x), -np.sin(about_x)], [0, np.sin(about_x), np.cos(about_x)]])
    turn_z = np.array([[np.cos(about_z), -np.sin(about_z), 0], [np.sin(about_z), np.cos(about_z), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = turn_z @ turn_x @ np.array([[0, 0, 1], [0, 1, 0], [-1, 0, 0]]) * spacing_mm
    affine[:3, 3] = (-31.0, 12.5, 87.0)
    return affine


def block_spine(*, spacing_mm=(0.8, 0.7, 4.0), tilt_deg=12.0, num_slices=13, num_bodies=4, angles_deg=(0.0, 0.0)):
    """Bodies L5 and up, above an unlabelled S1, all in line and tilted back by an angle in the sagittal plane."""
    size_mm = np.array([num_bodies * (BODY_MM + DISC_MM) + BODY_MM + 50, 150.0])
    shape = np.ceil(size_mm / spacing_mm[:2]).astype(int)
    tilt = np.deg2rad(tilt_deg)
    down, back = np.array([np.cos(tilt), np.sin(tilt)]), np.array([-np.sin(tilt), np.cos(tilt)])
    origin = size_mm / 2 - down * (num_bodies * (BODY_MM + DISC_MM) + BODY_MM) / 2
    pixels_mm = np.stack(np.mgrid[: shape[0], : shape[1]], axis=-1) * spacing_mm[:2] - origin
    u, v = pixels_mm @ down, pixels_mm @ back
    in_front = abs(v) <= DEPTH_MM / 2

    plane, image = np.zeros(shape, np.uint8), np.full(shape, FAT)
    corners = {}
    names = {label: name for name, label in SPIDER_VERTEBRAE.items()} | {0: "S1"}
    for index, label in enumerate(range(num_bodies, -1, -1)):
        top = index * (BODY_MM + DISC_MM)
        body = (u >= top) & (u < top + BODY_MM)
        plane[body & (in_front | ((v > 38) & (v < 60)))] = label
        image[body & in_front] = MARROW
        if label:
            disc = (u >= top + BODY_MM) & (u < top + BODY_MM + DISC_MM) & in_front
            plane[disc], image[disc] = 200 + label, DISC
        ends = np.array([[top, -1], [top, 1], [top + BODY_MM, 1], [top + BODY_MM, -1]]) * (1, DEPTH_MM / 2)
        corners[names[label]] = (origin + ends @ np.stack([down, back])) / spacing_mm[:2]
    plane[(v > 22) & (v < 36)], image[(v > 22) & (v < 36)] = 100, CSF

    inside = abs(np.arange(num_slices) - (num_slices - 1) / 2) * spacing_mm[2] <= HALF_WIDTH_MM
    affine = sagittal_affine(spacing_mm, angles_deg)
    gain = 1 + 0.1 * np.arange(num_slices)  # each slice has a scale of its own, as near a surface coil
    voxels = np.where(inside, image[:, :, None], FAT) * gain
    mask = np.where(inside, plane[:, :, None], 0).astype(np.uint8)
    return BlockSpine(Scan(voxels.astype(np.float32), affine, "blocks"), Scan(mask, affine, "block mask"), corners)
