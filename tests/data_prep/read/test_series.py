"""Which series are found in DICOM files, and what is said of those that are not read."""

from dataclasses import replace

import numpy as np
import pytest

from data_prep.read.scan import Scan
from data_prep.read.series import Facts, find_series
from tests.block_spine import sagittal_affine
from tests.dicom_files import save, series, small_scan_voxels

OBLIQUE = sagittal_affine((0.8, 0.7, 4.0), (7.0, -5.0))


@pytest.fixture
def scan():
    return Scan(small_scan_voxels(), OBLIQUE, "scan")


def test_facts_are_told_of_what_is_read_left_out_and_failed(tmp_path, scan):
    for folder, values in (
        ("read", {}),
        ("t1", {"EchoTime": 10, "RepetitionTime": 500, "SeriesDescription": "SAG T1"}),
        ("failed", {}),
    ):
        for one in series(tmp_path / folder, scan, patient=folder):
            one.SeriesDescription, one.SeriesDate = "SAG T2", "20260102"
            for name, value in values.items():
                setattr(one, name, value)
            save(one)
    (tmp_path / "failed" / "00002").unlink()
    found = find_series([tmp_path])
    (read,) = found.series
    np.testing.assert_allclose(read.facts.spacing_mm, (0.8, 0.7, 4.0), rtol=1e-6)
    told = Facts(plane="sagittal", contrast="t2", description="SAG T2", date="20260102", num_slices=6)
    assert replace(read.facts, spacing_mm=()) == told
    assert [(one.facts.contrast, one.facts.description) for one in found.left_out] == [("t1", "SAG T1")]
    (failed,) = found.failed
    assert failed.facts.num_slices == 5
    assert failed.facts.plane == "sagittal"
    np.testing.assert_allclose(failed.facts.spacing_mm, (0.8, 0.7, 4.0), rtol=1e-3)
