"""Corner files: vertebral bodies marked by hand or by another program, in the patient's own coordinates.

    {"scans": {"0007_t2": {"L4": {"corners_mm": [[x, y, z], [x, y, z], [x, y, z], [x, y, z]], "width_mm": 40}, …}, …}}

Corners are points of the patient (LPS, mm) in the body's mid-sagittal plane: upper anterior, upper posterior, lower
posterior, lower anterior; null where one is not known, as S1's lower ones. So they hold for the scan in any format.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, NotRequired

import numpy as np
import pydantic
from typing_extensions import TypedDict

from data_prep.anatomy.vertebrae import NAMES, VertebralBody
from data_prep.read.csv_tables import refuse
from data_prep.read.names import canonical
from data_prep.read.scan import Scan
from spinejax.errors import SpinejaxError

_WIDTH_MM = 35.0  # width of a lumbar body without its rounded flanks
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
    scans: dict[str, dict[Literal[NAMES], MarkedBody]]  # type: ignore[valid-type]


def read_corners(path: Path) -> dict[str, dict[str, MarkedBody]]:
    """Read a corner file: scan → vertebra → what is marked.

    Raises:
        SpinejaxError: the file is missing, no JSON, or has faults. All are listed, one per vertebra.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise SpinejaxError(f"--corners {path}: more than {_MAX_BYTES >> 20} MiB. Is it a corner file?")
        scans = _CornerFile.model_validate_json(path.read_bytes(), strict=True).scans
        return {canonical(name): bodies for name, bodies in scans.items()}
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


def bodies_from_corners(scan: Scan, bodies: Mapping[str, MarkedBody]) -> list[VertebralBody]:
    """A scan's vertebral bodies, from the top down, from its part of a corner file.

    Raises:
        SpinejaxError: a body is outside the scan's slices, or fewer than two are given.
    """
    if len(bodies) < 2:
        raise SpinejaxError(f"{scan.name}: the corner file has {len(bodies)} of its vertebrae; a disc needs two.")
    to_voxel = np.linalg.inv(scan.affine)
    found = []
    for name, body in bodies.items():
        points = np.array([[np.nan] * 3 if corner is None else corner for corner in body["corners_mm"]], float)
        voxels = (np.c_[points, np.ones(4)] @ to_voxel.T)[:, :3]
        reach = body.get("width_mm", _WIDTH_MM) / 2 / scan.spacing_mm[2]
        middle = np.nanmean(voxels[:, 2])
        first, stop = int(np.ceil(middle - reach)), int(np.floor(middle + reach)) + 1
        if first >= stop:  # a body between two thick slices
            first, stop = int(np.rint(middle)), int(np.rint(middle)) + 1
        first, stop = max(first, 0), min(stop, scan.voxels.shape[2])
        if first >= stop:
            raise SpinejaxError(f"{scan.name}: {name}'s corners are outside the slices. Are they in LPS and mm?")
        found.append(VertebralBody(name, voxels[:, :2], (first, stop)))
    return sorted(found, key=lambda body: NAMES.index(body.name), reverse=True)
