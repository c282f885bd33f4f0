import nibabel
import numpy as np
import pytest

from data_prep.read.metaimage import write_mha
from data_prep.read.series import find_series
from data_prep.read.volume_files import files_of, is_mask, is_volume, read_scan, stem_of, volume_files
from spinejax.errors import SpinejaxError
from tests.block_spine import block_spine

SPINE = block_spine(spacing_mm=(1.5, 1.5, 6.0), num_slices=3).scan
LPS_FROM_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


@pytest.fixture
def folder(tmp_path):
    """A scan as a NIfTI pair and one as a .mhd with its .raw, and files that only have such names."""
    nibabel.save(nibabel.Nifti1Pair(SPINE.voxels, LPS_FROM_RAS @ SPINE.affine), tmp_path / "a_t2.img")
    write_mha(tmp_path / "whole.mha", SPINE)
    (tmp_path / "b_t2.raw").write_bytes(SPINE.voxels.tobytes(order="F"))
    header = (tmp_path / "whole.mha").read_bytes().partition(b"ElementDataFile")[0].decode()
    header = "\n".join(line for line in header.splitlines() if not line.startswith("Compressed"))
    (tmp_path / "b_t2.mhd").write_text(f"{header}\nElementDataFile = b_t2.raw\n")
    (tmp_path / "whole.mha").unlink()
    (tmp_path / "photo.hdr").write_bytes(b"#?RADIANCE\n")
    (tmp_path / "disk.img").write_bytes(bytes(1000))
    return tmp_path


def test_a_scan_of_two_files_is_one_scan(folder):
    found = find_series([folder], weighting="any")
    assert [[path.name for path in one.files] for one in found.series] == [
        ["a_t2.hdr", "a_t2.img"],
        ["b_t2.mhd", "b_t2.raw"],
    ]
    for one in found.series:
        np.testing.assert_array_equal(one.read()[0].voxels, SPINE.voxels)
    assert "2 files are not scans: disk.img, photo.hdr" in str(found.left_out[0])
    assert [path.name for path in volume_files(folder)] == ["a_t2.hdr", "b_t2.mhd"]


@pytest.mark.parametrize("names", [["a_t2.img"], ["a_t2.hdr"], ["a_t2.img", "a_t2.hdr"]])
def test_either_half_names_the_pair(folder, names):
    found = find_series([folder / name for name in names])
    assert [one.key.rpartition("/")[2] for one in found.series] == ["a_t2"]


def test_names(tmp_path):
    assert stem_of(tmp_path / "a.b_t2.NII.GZ") == "a.b_t2"
    assert stem_of(tmp_path / "a_t2.seg.nrrd") == "a_t2"
    assert is_volume(tmp_path / "a.nrrd")
    assert not is_volume(tmp_path / "a.img")  # without a header
    assert [name for name in ("a.seg.nrrd", "a_seg.nrrd", "a_mask.mha") if not is_mask(tmp_path / name)] == []
    assert not is_mask(tmp_path / "a_t2.nrrd")
    assert files_of(tmp_path / "a.nii.gz") == (tmp_path / "a.nii.gz",)
    with pytest.raises(SpinejaxError, match="expected a name that ends in"):
        read_scan(tmp_path / "a.png", np.float32)
