"""What any scan must be like before vertebrae are looked for in it, and what is made of one that is otherwise.

A disc volume stores intensities as multiples of bone's, from 0 on. So a scan's darkest voxels must be near 0: in one
that was z-scored, half of the voxels would be cut off there.
"""

import dataclasses
import math

import numpy as np
from jaxtyping import Bool
from scipy import ndimage

from data_prep.read.scan import Scan
from spinejax.errors import SpinejaxError

_HEIGHT_MM = (40.0, 1200.0)  # of the image, from part of a lumbar spine to a whole spine
_USUAL_HEIGHT_MM = 300.0
_UNITS = {10.0: "cm", 1000.0: "m", 0.001: "µm"}  # by the factor that makes mm of them
_DARK_PERCENTILE, _BRIGHT_PERCENTILE = 0.1, 99.0
_NEAR_ZERO = 0.02  # of the bright voxels' value; resampling can undershoot as much
_FAR_ABOVE = 0.5  # of that value
_NO_DATA_SHARE, _NO_DATA_GAP = 1e-3, 0.05  # least share of the voxels, and distance from the others as a share of range


def plausible(scan: Scan) -> tuple[Scan, list[str]]:
    """The scan with intensities that begin near 0 and no gaps, and notes on what was changed.

    Voxels that are NaN, or far below all others, hold no data: at the margins they become as dark as the darkest.
    Intensities that begin below 0, or far above, are shifted: the 0.1 percentile becomes 0.

    Raises:
        SpinejaxError: the image is not of a spine's size; it is empty; or voxels within it are NaN.
    """
    _refuse_other_sizes(scan)
    voxels, name = scan.voxels, scan.name
    missing, notes = _without_data(voxels, name)
    known = voxels[~missing] if notes else voxels[::4, ::4]  # a part is enough, and takes no time
    low, bright = np.percentile(known, [_DARK_PERCENTILE, _BRIGHT_PERCENTILE])
    shift = 0.0
    if low < -_NEAR_ZERO * bright or low > _FAR_ABOVE * bright:
        shift = low
        how = "negative, as in a z-scored volume" if low < 0 else "far above 0"
        notes.append(f"{name}: its voxels begin at {low:.4g}, {how}: shifted by {-low:.4g}, so that the darkest are 0.")
    if not notes:
        return scan, notes
    filled = np.where(missing, low, voxels) - shift
    return dataclasses.replace(scan, voxels=filled.astype(voxels.dtype)), notes


def _without_data(voxels: np.ndarray, name: str) -> tuple[Bool[np.ndarray, "H W S"], list[str]]:
    """The voxels that hold no data, and a note if there are any. Raises SpinejaxError if NaN is within the image."""
    lowest = voxels.min()
    missing = np.isnan(voxels) if np.isnan(lowest) else np.zeros(voxels.shape, bool)
    if missing.all() or np.nanmin(voxels) == np.nanmax(voxels):
        raise SpinejaxError(f"{name}: every voxel is {voxels.flat[0]:g}: an empty image. Export it again.")
    if missing.any():
        if inner := int((missing & ~_margins(missing)).sum()):
            raise SpinejaxError(f"{name}: {inner} voxels within the image are NaN. Export it again.")
        return missing, [f"{name}: {_percent(missing)} of its voxels are NaN, at the margins: taken as no data."]
    if lowest < 0 and (fill := voxels == lowest).mean() >= _NO_DATA_SHARE:
        above = voxels[~fill]
        if above.min() - lowest > _NO_DATA_GAP * (np.percentile(above, _BRIGHT_PERCENTILE) - above.min()):
            what = f"{_percent(fill)} of its voxels are {lowest:g}, far below all others"
            return fill, [f"{name}: {what}: taken as no data."]
    return missing, []


def _refuse_other_sizes(scan: Scan) -> None:
    """Raises SpinejaxError if the image is too high or too low for a spine, with the factor that would make it one."""
    height_mm, depth_mm = (np.array(scan.voxels.shape) * scan.spacing_mm)[:2]
    if _HEIGHT_MM[0] <= height_mm <= _HEIGHT_MM[1]:
        return
    factor = 10.0 ** round(math.log10(_USUAL_HEIGHT_MM / height_mm))
    wrong = f"Is its unit {_UNITS[factor]}" if factor in _UNITS else "Is its spacing wrong"
    raise SpinejaxError(
        f"{scan.name}: its image is {height_mm:.4g} mm high and {depth_mm:.4g} mm deep; that of a lumbar spine is some "
        f"{_USUAL_HEIGHT_MM:.0f} mm high. With spacing × {factor:g} it would be {factor * height_mm:.0f} mm. {wrong}, "
        "or its orientation? Correct the header."
    )


def _margins(missing: Bool[np.ndarray, "H W S"]) -> Bool[np.ndarray, "H W S"]:
    """The missing voxels that are joined to the edge of their slice, and whole slices at either end."""
    in_slice = np.zeros((3, 3, 3), bool)
    in_slice[:, :, 1] = ndimage.generate_binary_structure(2, 1)
    edge = np.ones_like(missing)
    edge[1:-1, 1:-1] = False
    joined = ndimage.binary_propagation(missing & edge, in_slice, mask=missing)
    whole = np.asarray(missing.all((0, 1)))
    ends = np.logical_and.accumulate(whole) | np.logical_and.accumulate(whole[::-1])[::-1]
    return joined & (ends | ~whole)


def _percent(part: Bool[np.ndarray, "H W S"]) -> str:
    return f"{100 * part.mean():.2g} %"
