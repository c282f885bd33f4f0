"""Whether vertebral bodies have the size of bodies: in a file that gives a wrong spacing, they do not.

Exports as 8-bit pictures, for instance, often say 1 × 1 × 1 mm. A disc volume is scaled by the disc's own width, so it
does not suffer from a wrong pixel size; but slices that seem thin would be averaged.
"""

from collections.abc import Sequence

import numpy as np

from data_prep.anatomy.vertebrae import VertebralBody
from data_prep.read.scan import Scan

_DEPTH_MM, _USUAL_DEPTH_MM = (20.0, 48.0), 33.0  # median length of the endplates; 27 to 37 in 29 scans of SPIDER
_WIDTH, _USUAL_WIDTH = (0.5, 2.5), 1.25  # from side to side, as a multiple of that; 1.2 to 1.4 in phantoms
_MIN_BODIES = 3  # that show both flanks, to judge their width


def implausible_size(scan: Scan, bodies: Sequence[VertebralBody]) -> str:
    """What is wrong with the size of a scan's bodies, with the factor that would make it plausible; or nothing, ""."""
    spacing = scan.spacing_mm
    ends = np.stack([body.corners[[1, 2]] - body.corners[[0, 3]] for body in bodies]) * spacing[:2]
    depth_mm = float(np.nanmedian(np.linalg.norm(ends, axis=2)))
    whole = [body for body in bodies if body.slices[0] > 0 and body.slices[1] < scan.voxels.shape[2]]
    faults = []
    if not _DEPTH_MM[0] <= depth_mm <= _DEPTH_MM[1]:
        factor = _USUAL_DEPTH_MM / depth_mm
        faults.append(
            f"{depth_mm:.3g} mm from front to back; with pixel spacings × {factor:.2g} they would be "
            f"{_USUAL_DEPTH_MM:.0f} mm"
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
