"""A surname planted in everything that a hospital's export can hold it in is found nowhere in what is made of it."""

import io

import h5py
import pydicom
import pytest
from PIL import Image

from data_prep.__main__ import main
from data_prep.read_mha import write_mha
from data_prep.scan import Scan
from spinejax.dataset import DataSet
from tests.block_spine import block_spine
from tests.dicom_files import save, series

NAME = "Quillfeather"
SPINE = block_spine(spacing_mm=(1.5, 1.5, 6.0), num_slices=5)

TEXT_VRS = {"AE": 16, "CS": 16, "LO": 60, "LT": 60, "PN": 60, "SH": 16, "ST": 60, "UC": 60, "UT": 60}
KEPT = {"Modality", "PhotometricInterpretation", "ImageType", "RescaleType", "SpecificCharacterSet"}


def plant(dataset):
    """The name in every text attribute that the dictionary knows (some 2000), and in private ones."""
    for tag, (vr, _, _, retired, keyword) in pydicom.datadict.DicomDictionary.items():
        if vr in TEXT_VRS and keyword and not retired and keyword not in KEPT and tag >> 16 not in (0, 2, 4):
            dataset.add_new(tag, vr, NAME.upper() if vr == "CS" else NAME)
    block = dataset.private_block(0x0011, NAME, create=True)
    block.add_new(0x01, "LO", NAME)
    block.add_new(0x02, "OB", NAME.encode())
    dataset.PatientComments = f"{NAME}, by {NAME}"
    dataset.file_meta.SourceApplicationEntityTitle = NAME
    dataset.file_meta.PrivateInformationCreatorUID = "1.2.3"
    dataset.file_meta.PrivateInformation = NAME.encode()
    dataset.preamble = NAME.encode().ljust(128)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A data set of planted files, one good scan and one that fails, and all that the run printed."""
    root = tmp_path_factory.mktemp("root")
    source = root / NAME / f"export of {NAME}"
    masks = root / NAME / "masks"
    masks.mkdir(parents=True)
    for patient, voxels in ((NAME, SPINE.scan.voxels), (f"{NAME}^Ada", SPINE.scan.voxels[:-9])):
        slices = series(source / patient, Scan(voxels, SPINE.scan.affine, ""), patient=patient)
        for one in slices:
            uid = one.SeriesInstanceUID
            plant(one)
            one.PatientID = patient
            save(one, f"{one.filename}.{NAME}")
            (source / patient / one.filename.rpartition("/")[2]).unlink()
        write_mha(masks / f"{uid}.mha", SPINE.mask)
    write_mha(source / f"{NAME}_t2.mha", Scan(SPINE.scan.voxels + 1, SPINE.scan.affine, ""))
    write_mha(masks / f"{NAME}_t2.mha", SPINE.mask)
    labels = root / NAME / "labels.csv"
    labels.write_text(f"patient,scan,level,pfirrmann\n{NAME},,L5-S1,3\n")
    out = root / "out"
    command = ["scans", str(source), "--masks", str(masks), "--labels", str(labels), "--out", str(out)]
    assert main([*command, "--key", str(root / "key")]) == 2  # the second patient's mask does not fit
    assert main(["inspect", str(out), "--out", str(out / "sheet.png")]) == 0
    return out


def holds_name(data: bytes) -> bool:
    low = data.lower()
    spellings = (NAME.lower(), NAME.lower()[::-1])
    return any(text.encode(coding) in low for text in spellings for coding in ("ascii", "utf-16-le", "utf-16-be"))


def test_the_name_is_planted_and_the_discs_are_made(made):
    assert len(DataSet(made)) == 8
    assert set(DataSet(made).labels.ravel().tolist()) == {-1, 2}
    planted = next((made.parent / NAME / f"export of {NAME}" / NAME).iterdir()).read_bytes()
    assert planted.lower().count(NAME.lower().encode()) > 500


def test_no_file_of_the_data_set_holds_the_name(made):
    files = [path for path in made.rglob("*") if path.is_file()]
    assert len(files) >= 3
    for path in files:
        assert not holds_name(path.read_bytes()), path.name
        assert not holds_name(path.name.encode())


def test_nothing_in_the_shards_is_text_but_pseudonyms_levels_and_splits(made):
    data = DataSet(made)
    for name in {*data.patient, *data.scan}:
        assert len(name) == 16
        int(name, 16)
    for path in made.glob("*.h5"):
        with h5py.File(path, "r") as file:
            texts = {name for name, column in file.items() if column.dtype.kind not in "uif"}
            assert texts == {"level", "patient", "scan", "split"}
            assert not list(file.attrs)
            assert not [name for column in file.values() for name in column.attrs]


def test_no_identifier_of_dicom_is_in_the_data_set(made):
    root = pydicom.uid.generate_uid(entropy_srcs=["x"]).rpartition(".")[0].encode()
    assert not any(root in path.read_bytes() for path in made.rglob("*") if path.is_file())


def test_the_sheet_carries_no_words_but_the_drawn_ones(made):
    sheet = Image.open(io.BytesIO((made / "sheet.png").read_bytes()))
    assert set(sheet.info) <= {"Software", "dpi"}


def test_the_key_says_nothing(made):
    assert not holds_name((made.parent / "key").read_bytes())
