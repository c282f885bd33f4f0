"""Whether vertebral bodies have the size of bodies: in a file that gives a wrong spacing, they do not.

Exports as 8-bit pictures, for instance, often say 1 × 1 × 1 mm. A disc volume is scaled by the disc's own width, so it
does not suffer from a wrong pixel size; but slices that seem thin would be averaged.
"""

from collections.abc import Sequence

import numpy as np

from data_prep.anatomy.vertebrae import LAST_VERTEBRA, VertebralBody
from data_prep.read.scan import Scan

USUAL_DEPTH_MM = 33.0  # median length of the endplates; 27 to 37 in 29 scans of SPIDER
_DEPTH_MM = (20.0, 48.0)
_WIDTH, _USUAL_WIDTH = (0.5, 2.5), 1.25  # from side to side, as a multiple of that; 1.2 to 1.4 in phantoms
_APART_MM, _USUAL_APART_MM = (20.0, 55.0), 35.0  # from one vertebra's middle to the next
_MIN_BODIES = 3  # that show both flanks, to judge their width


def implausible_size(scan: Scan, bodies: Sequence[VertebralBody]) -> str:
    """What is wrong with the size of a scan's bodies, with the factor that would make it plausible; or nothing, ""."""
    spacing = scan.spacing_mm
    ends = np.stack([body.corners[[1, 2]] - body.corners[[0, 3]] for body in bodies]) * spacing[:2]
    depth_mm = float(np.nanmedian(np.linalg.norm(ends, axis=2)))
    whole = [body for body in bodies if body.slices[0] > 0 and body.slices[1] < scan.voxels.shape[2]]
    faults = []
    if not _DEPTH_MM[0] <= depth_mm <= _DEPTH_MM[1]:
        factor = USUAL_DEPTH_MM / depth_mm
        faults.append(
            f"{depth_mm:.3g} mm from front to back; with pixel spacings × {factor:.2g} they would be "
            f"{USUAL_DEPTH_MM:.0f} mm"
        )
    if len(whole) >= _MIN_BODIES:
        width_mm = float(np.median([body.slices[1] - body.slices[0] for body in whole]) * spacing[2])
        if not _WIDTH[0] <= width_mm / depth_mm <= _WIDTH[1]:
            factor = _USUAL_WIDTH * depth_mm / width_mm
            faults.append(
                f"{width_mm:.3g} mm from side to side, but {depth_mm:.3g} mm from front to back; with a slice spacing "
                f"× {factor:.2g} they would be {factor * width_mm:.0f} mm wide"
            )
    if not faults:
        return ""
    given = " × ".join(f"{value:.3g}" for value in spacing)
    return f"{scan.name}: vertebral bodies are {'; and '.join(faults)}. Is its spacing, {given} mm, wrong?"


def implausible_mask(mask: Scan) -> str:
    """What is wrong with the size of a mask, in SPIDER's labels, whose bodies were not found; or nothing, "".

    It is judged by the distance between neighbouring vertebrae, which needs no corners.
    """
    labels = [label for label in np.unique(mask.voxels).tolist() if 0 < label <= LAST_VERTEBRA]
    centres = np.array([np.argwhere(mask.voxels == label)[:, :2].mean(0) for label in labels]).reshape(-1, 2)
    steps = np.linalg.norm(np.diff(centres, axis=0) * mask.spacing_mm[:2], axis=1)[np.diff(labels) == 1]
    if not len(steps) or _APART_MM[0] <= (apart_mm := float(np.median(steps))) <= _APART_MM[1]:
        return ""
    factor = _USUAL_APART_MM / apart_mm
    return (
        f" Its vertebrae are {apart_mm:.3g} mm apart; with spacings × {factor:.2g} that would be {_USUAL_APART_MM:.0f}."
    )
