"""Corner files: vertebral bodies marked by hand or by another program, in the patient's own coordinates.

    {"scans": {"0007_t2": {"L4": {"corners_mm": [[x, y, z], [x, y, z], [x, y, z], [x, y, z]], "width_mm": 40}, …}, …}}

Corners are points of the patient (LPS, mm) in the body's mid-sagittal plane: upper anterior, upper posterior, lower
posterior, lower anterior; null where one is not known, as S1's lower ones. So they hold for the scan in any format.
With `"coordinateSystem": "RAS"` beside `"scans"`, as in 3D Slicer's own files, they are in RAS.
"""

import codecs
import itertools
import json
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NotRequired

import numpy as np
import pydantic
from typing_extensions import TypedDict

from data_prep.anatomy.vertebrae import NAMES, VertebralBody
from data_prep.read.csv_tables import refuse
from data_prep.read.names import canonical
from data_prep.read.scan import Scan
from spinejax.errors import SpinejaxError, printable

_WIDTH_MM = 35.0  # width of a lumbar body without its rounded flanks
_ENDPLATE_MM = (15.0, 70.0)
_STEEP = 1.75  # tangent of the angle, 60°, by which a body may be turned; the sacrum may be more
_ORDER = ("upper anterior", "upper posterior", "lower posterior", "lower anterior")
_MAX_BYTES = 1 << 28

_Millimetres = Annotated[float, pydantic.Field(ge=-2000, le=2000, allow_inf_nan=False)]
_Corner = tuple[_Millimetres, _Millimetres, _Millimetres] | None
_Corners = tuple[_Corner, _Corner, _Corner, _Corner]


def _with_an_endplate(corners: _Corners) -> _Corners:
    if None in corners[:2] and None in corners[2:]:
        raise ValueError("neither its upper nor its lower corners are known")
    return corners


class MarkedBody(TypedDict):
    """One vertebra of a corner file."""

    __pydantic_config__ = pydantic.ConfigDict(extra="forbid")  # type: ignore[misc]

    corners_mm: Annotated[_Corners, pydantic.AfterValidator(_with_an_endplate)]
    width_mm: NotRequired[Annotated[float, pydantic.Field(ge=5, le=100)]]


class _CornerFile(pydantic.BaseModel, extra="forbid"):
    coordinateSystem: Literal["LPS", "RAS"] = "LPS"  # noqa: N815  (3D Slicer's spelling)
    scans: dict[str, dict[Literal[NAMES], MarkedBody]]  # type: ignore[valid-type]


def read_corners(path: Path) -> dict[str, dict[str, MarkedBody]]:
    """Read a corner file: scan → vertebra → what is marked, in LPS.

    Raises:
        SpinejaxError: the file is missing, no JSON, or has faults. All are listed, one per vertebra.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise SpinejaxError(f"--corners {path}: more than {_MAX_BYTES >> 20} MiB. Is it a corner file?")
        content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
        if b'"markups"' in content and b'"scans"' not in content:
            raise SpinejaxError(
                f"--corners {path}: a markups file of 3D Slicer, which does not say whose corners its points are. "
                'Write them as {"scans": {SCAN: {VERTEBRA: {"corners_mm": …}}}}, as in docs/data.md.'
            )
        marked = _CornerFile.model_validate_json(content, strict=True)
        json.loads(content, object_pairs_hook=partial(_refuse_repeated, path))
    except OSError as error:
        raise SpinejaxError(f"--corners {path}: cannot be read ({error.strerror}).") from error
    except pydantic.ValidationError as error:
        faults: dict[tuple, str] = {}
        for fault in error.errors():
            scan_and_vertebra, field = fault["loc"][1:3], ".".join(map(str, fault["loc"][3:]))
            where = [", ".join(map(str, scan_and_vertebra)), field.removesuffix("[key]"), fault["msg"]]
            faults.setdefault(scan_and_vertebra, ": ".join(filter(None, where)))
        refuse(f"--corners {path}", [*faults.values()])
        raise
    if marked.coordinateSystem == "RAS":
        for body in itertools.chain.from_iterable(bodies.values() for bodies in marked.scans.values()):
            one, two, three, four = (point and (-point[0], -point[1], point[2]) for point in body["corners_mm"])
            body["corners_mm"] = one, two, three, four
    return {canonical(name): bodies for name, bodies in marked.scans.items()}


def _refuse_repeated(path: Path, pairs: list[tuple[str, object]]) -> None:
    """A JSON parser takes the last of several entries of one name; a user who pasted two may mean either."""
    for name, count in Counter(canonical(name) for name, _ in pairs).items():
        if count > 1:
            raise SpinejaxError(f"--corners {path}: {printable(name)} occurs {count} times. Remove all but one.")


def bodies_from_corners(scan: Scan, bodies: Mapping[str, MarkedBody]) -> list[VertebralBody]:
    """A scan's vertebral bodies, from the top down, from its part of a corner file.

    Raises:
        SpinejaxError: a body is outside the scan, or its corners are in another order; they are in RAS or in voxels; or
            fewer than two bodies are given.
    """
    if len(bodies) < 2:
        raise SpinejaxError(f"{scan.name}: the corner file has {len(bodies)} of its vertebrae; a disc needs two.")
    points = {
        name: np.array([[np.nan] * 3 if corner is None else corner for corner in body["corners_mm"]], float)
        for name, body in bodies.items()
    }
    widths_mm = {name: body.get("width_mm", _WIDTH_MM) for name, body in bodies.items()}
    to_voxel = np.linalg.inv(scan.affine)
    voxels = {name: (np.c_[each, np.ones(4)] @ to_voxel.T)[:, :3] for name, each in points.items()}
    if fault := _misfit(scan, voxels, widths_mm):
        raise SpinejaxError(f"{scan.name}: {fault}{_other_reading(scan, points, widths_mm)}")
    found = [VertebralBody(name, each[:, :2], _slices(scan, each, widths_mm[name])) for name, each in voxels.items()]
    return sorted(found, key=lambda body: NAMES.index(body.name), reverse=True)


def _slices(scan: Scan, voxels: np.ndarray, width_mm: float) -> tuple[int, int]:
    """The scan's slices that show a body; none if the first is not below the last."""
    reach, middle = width_mm / 2 / scan.spacing_mm[2], np.nanmean(voxels[:, 2])
    first, stop = int(np.ceil(middle - reach)), int(np.floor(middle + reach)) + 1
    if first >= stop:  # a body between two thick slices
        first, stop = int(np.rint(middle)), int(np.rint(middle)) + 1
    return max(first, 0), min(stop, scan.voxels.shape[2])


def _misfit(scan: Scan, voxels: Mapping[str, np.ndarray], widths_mm: Mapping[str, float]) -> str:
    """Why corners, (row, column, slice) by name, are not those of vertebral bodies in this scan; "" if they are."""
    rows = {}
    for name, corners in voxels.items():
        first, stop = _slices(scan, corners, widths_mm[name])
        if first >= stop:
            return f"{name}'s corners are outside the slices."
        centre = np.nanmean(corners[:, :2], axis=0)
        if ((centre < -0.5) | (centre > np.array(scan.voxels.shape[:2]) - 0.5)).any():
            return f"{name}'s corners are outside the image."
        corners_mm = corners[:, :2] * scan.spacing_mm[:2]
        backward, downward = corners_mm[[1, 2]] - corners_mm[[0, 3]], corners_mm[[3, 2]] - corners_mm[[0, 1]]
        steep = abs(backward[:, 0]) > _STEEP * backward[:, 1], abs(downward[:, 1]) > _STEEP * downward[:, 0]
        if np.nanmin(backward[:, 1]) <= 0 or (np.isfinite(corners).all() and np.any(steep)):
            return f"{name}'s corners are not in the order {', '.join(_ORDER)}."
        rows[name] = centre[0]
    in_order = sorted(rows, key=NAMES.index, reverse=True)
    for upper, lower in itertools.pairwise(in_order):
        if rows[upper] > rows[lower]:
            return f"{upper} is below {lower}: vertebrae are named from the sacrum up, S1, L5, L4 and so on."
    return ""


def _other_reading(scan: Scan, points: Mapping[str, np.ndarray], widths_mm: Mapping[str, float]) -> str:
    """How else the corners could be meant, in words: where that makes them bodies of this scan."""
    to_voxel = np.linalg.inv(scan.affine)
    ras = {name: (np.c_[each * (-1, -1, 1), np.ones(4)] @ to_voxel.T)[:, :3] for name, each in points.items()}
    if not _misfit(scan, ras, widths_mm):
        return (
            ' They fit in RAS: export them in LPS, or write "coordinateSystem": "RAS" beside "scans" in the file. If '
            "it says so, leave that out."
        )
    whole = {name: each for name, each in points.items() if np.isfinite(each).all()}
    for order in itertools.permutations(range(4)):
        turned = {name: (np.c_[each[list(order)], np.ones(4)] @ to_voxel.T)[:, :3] for name, each in whole.items()}
        if len(whole) > 1 and not _misfit(scan, turned, widths_mm):
            given = ", ".join(_ORDER[order.index(place)] for place in range(4))
            return f" They fit in the order {given}."
    shape = np.array(scan.voxels.shape)
    for axes, flips in itertools.product(itertools.permutations(range(3)), itertools.product((False, True), repeat=3)):
        voxels = {name: np.where(flips, shape - 1 - each[:, axes], each[:, axes]) for name, each in points.items()}
        ends = np.array([(each[1] - each[0])[:2] * scan.spacing_mm[:2] for each in voxels.values()])
        lengths_mm = np.linalg.norm(ends, axis=1)
        sized = _ENDPLATE_MM[0] <= np.nanmedian(lengths_mm) <= _ENDPLATE_MM[1]
        if sized and not _misfit(scan, voxels, widths_mm):
            return " They look like voxel indices; expected points in LPS, in mm."
    return " Are they in LPS and mm, and of this scan?"
