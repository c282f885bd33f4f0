"""The command that brings results back to the hospital: `results`."""

from pathlib import Path
from typing import Literal

import tyro

from data_prep.commands.printing import print_failures, print_notes
from data_prep.dataset.pseudonyms import load_or_make_key
from data_prep.read import dicomweb
from data_prep.sources.scan_files import Cutting
from spinejax.errors import SpinejaxError, needs
from spinejax.files.addresses import ScanPath


def results(
    evaluation: tyro.conf.Positional[Path],
    *,
    source: list[ScanPath],
    key: Path,
    out: Path,
    masks: Path | None = None,
    corners: Path | None = None,
    convention: Literal["spider", "totalspineseg", "spineps", "totalsegmentator"] | None = None,
    lowest_level: str | None = None,
    stow: str | None = None,
) -> int:
    """Write an evaluation's grades and hotspots as DICOM, for the archive of the series that they are of.

    Args:
        evaluation: Folder that `evaluate.py` wrote.
        source: DICOM series that the data set was made of: files and folders, or a study or series of a DICOMweb server
            (dicomweb://HOST/PATH/studies/UID; dicomwebs:// by TLS).
        key: File with the secret key of the data set's pseudonyms, by which scans are found again.
        out: Folder for the DICOM files. They carry patients' names, so others cannot read it.
        masks: Folder with the masks that the data set was made with, for the segmentation of vertebrae and discs.
        corners: File with the corners that the data set was made with (JSON), instead of masks. Without masks and
            corners, the vertebrae are detected.
        convention: Tool that made the masks. Default: recognised by its labels.
        lowest_level: Name of each scan's lowest disc, if the data set was made with it.
        stow: Address of a DICOMweb server (http:// or https://) that the files are sent to. It takes name and password
            from DICOMWEB_USER and DICOMWEB_PASSWORD, a token from DICOMWEB_TOKEN, or else ~/.netrc.
    """
    with needs("Writing DICOM results needs highdicom", "scans"):
        from data_prep.output.dicom_results import results_as_dicom
    if not key.is_file():
        raise SpinejaxError(f"--key {key}: no such file. It was written when the data set was made.")
    cutting = Cutting(convention=convention, lowest_level=lowest_level)
    if stow:
        dicomweb.check_server(stow)
    with dicomweb.fetched(source) as sources:
        returned = results_as_dicom(
            evaluation, sources, load_or_make_key(key, out), out, masks=masks, corners=corners, cutting=cutting
        )
    print_notes(returned.notes)
    print_failures(returned.failures)
    print(
        f"{out}: {returned.scans} structured reports, {returned.maps} parametric maps, {returned.pictures} pictures, "
        f"{returned.segmentations} segmentations"
    )
    refused: dict[str, str] = {}
    if stow:
        sent, refused = dicomweb.store(stow, returned.files)
        print_failures(refused)
        print(f"{stow}: {sent} of {len(returned.files)} objects stored")
    return 2 if returned.failures or refused else 0
