"""A surname planted in everything that a hospital's export can hold it in is found nowhere in what is made of it."""

import base64
import contextlib
import gzip
import io
import re
import zipfile

import h5py
import nibabel
import pydicom
import pytest
from PIL import Image

from data_prep.__main__ import main
from data_prep.read.metaimage import write_mha
from data_prep.read.nifti import write_nifti
from data_prep.read.scan import Scan
from spinejax.commands import evaluate, train
from spinejax.config import Config
from spinejax.data.dataset import DataSet
from spinejax.inference.hotspots import Method
from spinejax.parallel import runtime
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


def plant_in_mha(path):
    """The name in a field of its own, which MetaImage allows."""
    data = path.read_bytes()
    path.write_bytes(data.replace(b"ElementDataFile", f"PatientName = {NAME}\nElementDataFile".encode(), 1))


def plant_in_nifti(path):
    """The name in every text field of the header, and in a comment behind it."""
    image = nibabel.load(path)
    for field in ("descrip", "aux_file", "intent_name", "db_name", "data_type"):
        if field in image.header:
            image.header[field] = NAME[: image.header[field].dtype.itemsize].encode()
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", NAME.encode()))
    nibabel.save(nibabel.Nifti1Image(image.get_fdata(dtype="float32"), image.affine, image.header), path)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A data set of planted files, good scans and one that fails."""
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
    plant_in_mha(source / f"{NAME}_t2.mha")
    write_mha(masks / f"{NAME}_t2.mha", SPINE.mask)
    plant_in_mha(masks / f"{NAME}_t2.mha")
    labels = ["patient,scan,level,pfirrmann", f"{NAME},,L5-S1,3"]
    for number, patient in enumerate(f"{NAME}{letter}" for letter in "BCD"):
        scan = Scan(SPINE.scan.voxels + 7 * number, SPINE.scan.affine, "")
        write_nifti(source / f"{patient}_t2.nii.gz", scan)
        plant_in_nifti(source / f"{patient}_t2.nii.gz")
        write_mha(masks / f"{patient}_t2.mha", SPINE.mask)
        labels.append(f"{patient},,L5-S1,3")
    (root / NAME / "labels.csv").write_text("\n".join(labels))
    out = root / "out"
    command = ["scans", str(source), "--masks", str(masks), "--labels", str(root / NAME / "labels.csv")]
    assert main([*command, "--out", str(out), "--key", str(root / "key")]) == 2  # the second patient's does not fit
    assert main(["inspect", str(out), "--out", str(out / "sheet.png")]) == 0
    assert main(["overlay", str(source), "--masks", str(masks), "--out", str(out / "overlay.png")]) == 0
    return out


@pytest.fixture(scope="module")
def used(made):
    """What else is made of the data set: a training run, an evaluation with hotspots and report, one of raw scans."""
    root = made.parent / "used"
    source, masks = made.parent / NAME / f"export of {NAME}", made.parent / NAME / "masks"
    options = Config(tasks=("pfirrmann",), width=0.02, batch_size=8, epochs=1)
    logs = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "set_up", lambda **_: None)
        with contextlib.redirect_stdout(logs), contextlib.redirect_stderr(logs):
            train.main(train.Arguments(made, root / "run", options))
            common = {"checkpoint": root / "run", "batch_size": 8, "hotspots": True, "hotspot": Method(num_views=1)}
            evaluate.main(
                evaluate.Arguments(data=made, out=root / "graded", report=root / "page", split="train", **common)
            )
        evaluate.main(
            evaluate.Arguments(scan=(source,), masks=masks, out=root / "raw", report=root / "raw page", **common)
        )
    (root / "terminal.log").write_text(logs.getvalue())
    return root


def holds_name(data: bytes) -> bool:
    low = data.lower()
    spellings = (NAME.lower(), NAME.lower()[::-1])
    return any(text.encode(coding) in low for text in spellings for coding in ("ascii", "utf-16-le", "utf-16-be"))


def unpacked(path):
    """A file's bytes, and those of all that is packed in it: members, columns, attributes, pictures and their texts."""
    data = path.read_bytes()
    yield data
    if path.suffix == ".gz":
        yield gzip.decompress(data)
    elif path.suffix == ".png":
        yield repr(Image.open(io.BytesIO(data)).info).encode()
    elif path.suffix in (".html", ".js"):
        yield from map(base64.b64decode, re.findall(rb"base64,([A-Za-z0-9+/]+=*)", data))
    elif path.suffix in (".h5", ".hdf5"):
        with h5py.File(path, "r") as file:
            things = [file]
            file.visititems(lambda _, thing: things.append(thing))
            for thing in things:
                yield repr((thing.name, dict(thing.attrs))).encode()
                if isinstance(thing, h5py.Dataset) and thing.dtype.kind not in "uif":
                    yield repr(thing[()]).encode()
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as packed:
            for name in packed.namelist():
                yield name.encode() + packed.read(name)


def test_the_name_is_planted_and_the_discs_are_made(made):
    assert len(DataSet(made)) == 20
    assert set(DataSet(made).labels.ravel().tolist()) == {-1, 2}
    planted = next((made.parent / NAME / f"export of {NAME}" / NAME).iterdir()).read_bytes()
    assert planted.lower().count(NAME.lower().encode()) > 500
    nifti = gzip.decompress(next((made.parent / NAME).rglob("*B_t2.nii.gz")).read_bytes())
    assert nifti.count(NAME.encode()) >= 4


def test_no_file_of_the_data_set_holds_the_name(made):
    files = [path for path in made.rglob("*") if path.is_file()]
    assert len(files) >= 3
    for path in files:
        assert not any(map(holds_name, unpacked(path))), path.name
        assert not holds_name(path.name.encode())


@pytest.mark.slow
def test_no_file_of_run_evaluation_report_or_raw_scans_holds_the_name(used):
    files = [path for path in used.rglob("*") if path.is_file()]
    kinds = {path.name for path in files}
    assert {"log.jsonl", "curves.png", "config.json", "terminal.log", "results.json", "predictions.csv"} <= kinds
    assert {"index.html", "levels.png", "manifest.json", "hotspots.h5"} <= kinds
    assert sum(path.name.endswith(".nii.gz") for path in files) > 20
    for path in files:
        assert not holds_name(str(path.relative_to(used)).encode())
        for part in unpacked(path):
            assert not holds_name(part), path.relative_to(used)


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
