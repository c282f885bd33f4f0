"""The scans in the files of one DICOM series."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from data_prep.read.choice import judge
from data_prep.read.csv_tables import some
from data_prep.read.dicom import middle_slice, read_series
from data_prep.read.dicom_headers import DicomFile, Frame
from data_prep.read.found import Facts, Found, LeftOut, Series
from data_prep.read.image_kind import NO_PLACE
from data_prep.read.names import canonical
from data_prep.read.parts import PLANES, parts_of, step_mm, without_copies
from data_prep.read.patient_tags import Evidence, alike
from spinejax.errors import SpinejaxError


def take_series(
    key: str, files: list[DicomFile], damaged: Path | None, found: Found, weighting: str, burned: bool
) -> None:
    """Record the parts of one DICOM series as scans, left out or failed. `damaged` is a file that cannot be read."""
    name = _dicom_name(files[0].path, key)
    others = tuple(file for file in files if file.not_a_scan)
    whole = _facts(files[0], [frame for file in files for frame in file.frames] or len(files))
    try:
        if reasons := sorted({file.not_a_scan for file in others}):
            if reasons == [NO_PLACE] and len(others) == len(files):
                raise SpinejaxError(f"{name}: {NO_PLACE} in any of its {len(files)} files. Export it again with it.")
            which = some([file.path.name for file in others])
            reason = f"{len(others)} of {len(files)} files: {', '.join(reasons)} ({which})"
            found.left_out.append(
                LeftOut(name, reason, tuple(file.path for file in others), _facts(others[0], len(others)))
            )
        if len(others) == len(files):
            return
        images, notes = without_copies([file for file in files if not file.not_a_scan], name)
        parts, more = parts_of([frame for file in images for frame in file.frames], name)
        names = [_dicom_name(part.frames[0].path, key + part.suffix) for part in parts]
        judged = judge(parts, name, names, weighting)
        if any(not one.left_out for one in judged):
            _refuse_whole(key, images, damaged, name, burned)
    except SpinejaxError as error:
        found.failed.append(LeftOut(name, str(error), tuple(file.path for file in files), whole))
        return
    total, declared = sum(len(part.frames) for part in parts), max(file.declared for file in images)
    if declared > total:
        more.append(f"{name}: {total} of the {declared} images that it declares. Is an end slice missing?")
    more += [
        f"{name}: {file.placeless} of the {len(file.frames) + file.placeless} frames of {file.path.name} have "
        "no position in the patient, and were left out"
        for file in images
        if file.placeless
    ]
    of_path = {file.path: file for file in images}
    for part, own, one in zip(parts, names, judged, strict=True):
        facts = replace(_facts(of_path[part.frames[0].path], part.frames), contrast=str(part.contrast))
        paths = tuple(dict.fromkeys(frame.path for frame in part.frames))
        read = partial(read_series, part.frames, own, np.float32, (*notes, *more, *one.notes))
        evidence = _evidence(key + part.suffix, files)
        look = partial(middle_slice, part.frames)
        series = Series(own, key + part.suffix, "", paths, read, facts, evidence, look=look)
        if one.left_out:
            found.left_out.append(LeftOut(own, one.left_out, paths, facts, series))
        elif one.failed:
            of_all = one.failed.startswith(f"{name}: ")
            found.failed.append(LeftOut(name if of_all else own, one.failed, paths, facts, series))
        else:
            found.series.append(series)


def _dicom_name(file: Path, key: str) -> str:
    return f"{canonical(file.parent.name or str(file.parent))}, series {key}"


def _refuse_whole(key: str, images: list[DicomFile], damaged: Path | None, name: str, burned: bool) -> None:
    """Raises SpinejaxError if a series with a scan in it cannot be used, whatever its parts are."""
    patients = {alike(file.patient): file.patient for file in images if file.patient}
    if not key:
        raise SpinejaxError(f"{name}: no SeriesInstanceUID, which tells series apart. Export it again.")
    if len(patients) > 1:
        ids = some(sorted(patients.values()))
        raise SpinejaxError(f"{name}: files of {len(patients)} patients ({ids}), expected one. Export it again.")
    studies = {file.study for file in images if file.study}
    if len(studies) > 1:  # an anonymiser may give all series one identifier
        raise SpinejaxError(
            f"{name}: files of {len(studies)} studies ({some(sorted(studies))}), expected one: they may be of several "
            "patients. Export it again."
        )
    if any(file.burned_in for file in images) and not burned:
        raise SpinejaxError(
            f"{name}: BurnedInAnnotation is YES, so names may be in its pixels. Look at them; `data_prep scans "
            "--burned-in` reads them."
        )
    if damaged:
        raise SpinejaxError(f"{name}: {damaged.name} of it cannot be read. Copy it again, or leave the series out.")


def _facts(file: DicomFile, frames: Sequence[Frame] | int) -> Facts:
    """The facts of some images of a series, or of so many that have no place. The plane is that of most."""
    facts = Facts(description=file.description, date=file.date, time=file.time)
    if isinstance(frames, int):
        return replace(facts, num_slices=frames)
    plane = PLANES[int(np.argmax(np.median([abs(frame.normal) for frame in frames], axis=0)))]
    rows, columns = frames[0].spacing_mm.tolist()
    spacing_mm = (rows, columns, step_mm(frames))
    return replace(facts, plane=plane, num_slices=len(frames), spacing_mm=spacing_mm)


def _evidence(key: str, files: Sequence[DicomFile]) -> Evidence:
    """What the files of one series, called `key`, say of its patient."""
    first = files[0]
    return Evidence(
        path=first.path,
        folders=tuple(sorted({file.path.parent for file in files})),
        uid=key,
        patient_id=next((file.patient for file in files if file.patient), ""),
        patient_name=first.patient_name,
        birth_date=first.birth_date,
        study=first.study,
    )
