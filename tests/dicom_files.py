"""DICOM files with any one thing changed, for tests of the reader."""

import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from data_prep.phantom.write_dicom import write_dicom


def series(folder, scan, *, patient="p1", name="t2"):
    """A classic series on disk; its datasets by slice, to be changed and saved again with `save`."""
    write_dicom(folder, scan, patient=patient, series=name)
    return [pydicom.dcmread(path) for path in sorted(folder.iterdir())]


def save(dataset, path=None):
    dataset.save_as(path or dataset.filename, enforce_file_format=True)


def pack_as_jpeg_lossless(path, syntax):
    """Pack a file's pixels in place, as an archive would (pydicom has no encoder for it)."""
    import gdcm

    reader, writer, change = gdcm.ImageReader(), gdcm.ImageWriter(), gdcm.ImageChangeTransferSyntax()
    reader.SetFileName(str(path))
    assert reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.GetTSType(str(syntax))))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    writer.SetFileName(str(path))
    assert writer.Write()


def enhanced(slices):
    """The slices of a classic series in one enhanced multi-frame dataset, its frames in the order given."""
    first = slices[0]
    out = Dataset()
    out.file_meta = first.file_meta
    out.SOPClassUID, out.SOPInstanceUID = (
        pydicom.uid.EnhancedMRImageStorage,
        pydicom.uid.generate_uid(entropy_srcs=["enhanced"]),
    )
    for name in (
        "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "PatientID", "PatientName", "Modality", "Rows",
        "Columns", "SamplesPerPixel", "PhotometricInterpretation", "PixelRepresentation", "BitsAllocated", "BitsStored",
        "HighBit",
    ):  # fmt: skip
        out[name] = first[name]
    out.ImageType = ["ORIGINAL", "PRIMARY", "OTHER", "NONE"]
    out.NumberOfFrames = len(slices)
    shared = Dataset()
    shared.PlaneOrientationSequence = group(ImageOrientationPatient=first.ImageOrientationPatient)
    shared.PixelMeasuresSequence = group(PixelSpacing=first.PixelSpacing, SliceThickness=first.SliceThickness)
    shared.MREchoSequence = group(EffectiveEchoTime=100.0)
    out.SharedFunctionalGroupsSequence = Sequence([shared])
    out.PerFrameFunctionalGroupsSequence = Sequence([frame_groups(one) for one in slices])
    out.PixelData = b"".join(one.PixelData for one in slices)
    return out


def frame_groups(one):
    groups = Dataset()
    groups.PlanePositionSequence = group(ImagePositionPatient=one.ImagePositionPatient)
    groups.PixelValueTransformationSequence = group(
        RescaleSlope=one.RescaleSlope, RescaleIntercept=one.RescaleIntercept, RescaleType="US"
    )
    return groups


def group(**values):
    item = Dataset()
    for name, value in values.items():
        setattr(item, name, value)
    return Sequence([item])


def small_scan_voxels():
    """A scan small enough for hundreds of files, in which no two voxels are alike."""
    return np.random.default_rng(0).permutation(40 * 36 * 6).reshape(40, 36, 6).astype(np.float32)
