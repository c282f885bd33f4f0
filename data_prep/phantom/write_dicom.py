"""A scan written as a classic DICOM series, one file per slice: for phantoms, to compare the readers with one truth."""

from pathlib import Path

import numpy as np

from data_prep.read.dicom_files import import_pydicom
from data_prep.read.scan import Scan
from spinejax.files.atomic import write_atomically

_MR_IMAGE_STORAGE = "1.2.840.10008.5.1.4.1.1.4"
_T2_ECHO_MS, _T2_REPETITION_MS = 100.0, 3500.0


def write_dicom(folder: Path, scan: Scan, *, patient: str, series: str) -> str:
    """Write one file per slice, `00000`, `00001`, …, without suffixes, as a scanner's export has them.

    Voxels are stored as 16 bits, rescaled to the scan's range. All identifiers are made from `patient`, the PatientID,
    and `series`, so the same scan gives the same bytes.

    Returns:
        The SeriesInstanceUID.
    """
    pydicom = import_pydicom()
    folder.mkdir(parents=True, exist_ok=True)

    def uid(*names) -> str:
        return pydicom.uid.generate_uid(entropy_srcs=["spinejax", patient, series, *map(str, names)])

    def decimals(values) -> list[str]:
        return [pydicom.valuerep.format_number_as_ds(float(value)) for value in values]

    low, high = float(scan.voxels.min()), float(scan.voxels.max())
    slope = (high - low) / 65535 or 1.0
    stored = np.rint((scan.voxels - low) / slope).clip(0, 65535).astype("<u2")
    spacing = scan.spacing_mm
    directions = scan.affine[:3, :3] / spacing
    for index in range(stored.shape[2]):
        data = pydicom.Dataset()
        data.SOPClassUID, data.SOPInstanceUID = _MR_IMAGE_STORAGE, uid("image", index)
        data.StudyInstanceUID, data.SeriesInstanceUID = uid("study"), uid("series")
        data.FrameOfReferenceUID = uid("frame")
        data.PatientID, data.PatientName, data.Modality = patient, patient, "MR"
        data.SeriesDescription, data.ImageType = series, ["DERIVED", "PRIMARY", "OTHER"]
        data.EchoTime, data.RepetitionTime = _T2_ECHO_MS, _T2_REPETITION_MS
        data.InstanceNumber, data.ImagesInAcquisition = index + 1, stored.shape[2]
        data.ImagePositionPatient = decimals((scan.affine @ [0, 0, index, 1])[:3])
        data.ImageOrientationPatient = decimals([*directions[:, 1], *directions[:, 0]])
        data.PixelSpacing, data.SliceThickness = decimals(spacing[:2]), decimals(spacing[2:])[0]
        data.RescaleSlope, data.RescaleIntercept, data.RescaleType = f"{slope:.10g}", f"{low:.10g}", "US"
        data.Rows, data.Columns = stored.shape[:2]
        data.SamplesPerPixel, data.PhotometricInterpretation, data.PixelRepresentation = 1, "MONOCHROME2", 0
        data.BitsAllocated, data.BitsStored, data.HighBit = 16, 16, 15
        data.PixelData = stored[:, :, index].tobytes()
        data.file_meta = pydicom.dataset.FileMetaDataset()
        data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        write_atomically(folder / f"{index:05d}", lambda path, data=data: data.save_as(path, enforce_file_format=True))
    return uid("series")
