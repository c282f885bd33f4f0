import csv
from pathlib import Path

import numpy as np
import pytest

from data_prep.__main__ import main
from data_prep.anatomy.vertebrae import bodies_from_spider_mask
from data_prep.dataset.pseudonyms import Pseudonyms
from data_prep.detector.detect import Detection
from data_prep.detector.training.cross_fitting import fold_of
from data_prep.read.metaimage import write_mha
from data_prep.read.scan import Scan
from data_prep.sources.spider import COLUMNS, SPIDER_TASKS, read_gradings, spider_jobs
from spinejax.data.dataset import DataSet
from spinejax.errors import SpinejaxError
from tests.block_spine import block_spine

KEY = Pseudonyms(bytes(32))
HEADER = ["Patient", "IVD label", *COLUMNS]
SHARED = Path(__file__).parents[4] / "shared" / "data" / "spider_mini"


def row(patient, disc, **values):
    healthy = dict.fromkeys(COLUMNS, "0") | {"Pfirrman grade": "1"}
    return {"Patient": str(patient), "IVD label": str(disc)} | healthy | values


def write_table(path, rows, header=None):
    with open(path, "w", newline="") as file:
        table = csv.DictWriter(file, header or list(rows[0]))
        table.writeheader()
        table.writerows(rows)


def write_root(root, patients=range(1, 6), subset=None, series="t2_SPACE", num_slices=3):
    """A dataset of block spines: patient 1 has graded discs, 2 has no grades at all."""
    spine = block_spine(spacing_mm=(1.5, 1.5, 6.0), num_slices=num_slices)
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for patient in patients:
        voxels = spine.scan.voxels * (1 + patient / 10)
        write_mha(root / "images" / f"{patient}_{series}.mha", Scan(voxels, spine.scan.affine, ""))
        write_mha(root / "masks" / f"{patient}_{series}.mha", spine.mask)
    grades = [row(patient, disc, Modic=str(patient % 4)) for patient in patients if patient != 2 for disc in (1, 2, 3)]
    write_table(root / "radiological_gradings.csv", grades)
    overview = [
        {"new_file_name": f"{p}_{s}", "subset": (subset or {}).get(p, "training")}
        for p in patients
        for s in ("t1", series)
    ]
    write_table(root / "overview.csv", overview)
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_root(tmp_path_factory.mktemp("spider") / "root")


def jobs(root, **options):
    return spider_jobs(root, **({"series": ["t2_SPACE"], "seed": 0, "pseudonyms": KEY} | options))[0]


def job_of(jobs, patient):
    return next(job for job in jobs if job.patient == KEY.patient(str(patient)))


# Jobs ----------------------------------------------------------------------------------------------------------------


def test_every_scan_is_a_job_under_pseudonyms(root):
    made = jobs(root)
    assert len(made) == 5
    assert {job.patient for job in made} == {KEY.patient(str(patient)) for patient in range(1, 6)}
    assert len({job.scan for job in made}) == 5
    assert set(job_of(made, 1).labels) == {"L5-S1", "L4-L5", "L3-L4"}
    assert job_of(made, 2).labels == {}


def test_discs_come_with_regions(root):
    discs, notes = job_of(jobs(root), 1).cut()
    assert [disc.level for disc in discs] == ["L2-L3", "L3-L4", "L4-L5", "L5-S1"]
    assert notes == []
    assert all(disc.region is not None for disc in discs)


def test_split_is_80_10_10_without_validation_patients(root):
    assert sorted(job.split for job in jobs(root)) == ["test", "train", "train", "train", "validation"]


def test_official_validation_patients_are_the_test_split(tmp_path):
    made = jobs(write_root(tmp_path / "root", subset={2: "validation", 4: "validation"}))
    splits = {patient: job_of(made, patient).split for patient in range(1, 6)}
    assert splits[2] == splits[4] == "test"
    assert sorted(splits.values()) == ["test", "test", "train", "train", "validation"]


def test_series_is_chosen_by_name(tmp_path):
    root = write_root(tmp_path / "root", patients=(1, 2), series="t2")
    spine = block_spine(spacing_mm=(1.5, 1.5, 6.0), num_slices=1)
    write_mha(root / "images" / "1_x_t2.mha", spine.scan)
    assert len(jobs(root, series=["t2"])) == 2
    with pytest.raises(SpinejaxError, match=r"--series t2_SPACE: .*t2 \(2\)"):
        jobs(root)


# Several series, and scans without masks ------------------------------------------------------------------------------


def with_t2(root):
    """Patients 1 to 5 also have a T2 series, without masks."""
    for path in (root / "images").glob("*_t2_SPACE.mha"):
        (root / "images" / path.name.replace("_SPACE", "")).write_bytes(path.read_bytes())
    return root


def test_a_patient_of_two_series_is_in_one_split(tmp_path):
    made = jobs(with_t2(write_root(tmp_path / "root")), series=["t2_SPACE", "t2"], detect_missing=True)
    assert len(made) == len({job.scan for job in made}) == 10
    splits = {}
    for job in made:
        splits.setdefault(job.patient, []).append(job.split)
    assert all(len(each) == 2 and len(set(each)) == 1 for each in splits.values())
    assert sorted(job.name for job in made if len(job.sources) == 2) == [f"{p}_t2_SPACE.mha" for p in range(1, 6)]


def test_scans_without_masks_are_detected_only_if_asked(tmp_path):
    root = with_t2(write_root(tmp_path / "root"))
    with pytest.raises(SpinejaxError, match=r"no mask for 5 of 5 t2 scans .*--detect-missing"):
        jobs(root, series=["t2"])
    assert len(jobs(root, series=["t2"], detect_missing=True)) == 5


def test_one_official_subset_alone(tmp_path):
    root = write_root(tmp_path / "root", subset={2: "validation", 4: "validation"})
    assert {job.patient for job in jobs(root, subset="training")} == {KEY.patient(p) for p in "135"}
    assert {job.split for job in jobs(root, subset="training")} == {"train", "validation", "test"}
    assert {job.split for job in jobs(root, subset="validation")} == {"test"}
    with pytest.raises(SpinejaxError, match="--subset validation: no scan under"):
        jobs(write_root(tmp_path / "other"), subset="validation")


@pytest.mark.parametrize("doubtful", [False, True])
def test_doubtful_levels_have_no_grades(tmp_path, monkeypatch, doubtful):
    root = write_root(tmp_path / "root", patients=(1, 2), series="t2", num_slices=1)
    for path in (root / "masks").iterdir():
        path.unlink()
    bodies, _ = bodies_from_spider_mask(block_spine(spacing_mm=(1.5, 1.5, 6.0), num_slices=1).mask)
    found = Detection(bodies, {}, ["a note"], doubtful_levels=doubtful)
    monkeypatch.setattr("data_prep.detector.detect.detect", lambda scan, **_: found)
    kept, notes = job_of(jobs(root, series=["t2"], detect_missing=True, keep_doubtful=True), 1).cut()
    assert [disc.level for disc in kept] == ["L2-L3", "L3-L4", "L4-L5", "L5-S1"]
    assert all(disc.slices == (7, 8) for disc in kept)  # one slice, in the middle; the others are padding
    assert notes == ["a note"]
    discs, notes = job_of(jobs(root, series=["t2"], detect_missing=True), 1).cut()
    assert len(discs) == (0 if doubtful else 4)
    assert any("left out: 1_t2.mha: its levels are doubtful" in note for note in notes) == doubtful


def test_a_patient_is_cut_with_the_detector_that_has_not_seen_him(tmp_path, monkeypatch):
    """SPIDER's patient 1 taught all networks but one; nobody has seen patient 9999, so all may be used."""
    root = write_root(tmp_path / "root", patients=(1, 9999), series="t2", num_slices=1)
    for path in (root / "masks").iterdir():
        path.unlink()
    asked = {}

    def detect(scan, *, member, **_):
        asked[scan.name] = member
        raise SpinejaxError("seen enough")

    monkeypatch.setattr("data_prep.detector.detect.detect", detect)
    for job in jobs(root, series=["t2"], detect_missing=True):
        with pytest.raises(SpinejaxError, match="seen enough"):
            job.locate()
    assert asked == {"1_t2.mha": fold_of("spider", "1"), "9999_t2.mha": None}


# Gradings ------------------------------------------------------------------------------------------------------------


def test_gradings_become_labels(tmp_path):
    rows = [
        row(7, 1, **{"Pfirrman grade": "5", "Modic": "3", "UP endplate": "1"}),
        row(7, 9, **{"LOW endplate": "1", "Disc narrowing": "", "Disc bulging": "1"}),
        row(7, 0),
    ]
    write_table(tmp_path / "gradings.csv", rows)
    gradings = read_gradings(tmp_path / "gradings.csv")
    assert set(gradings["7"]) == {"L5-S1", "T9-T10"}
    lowest, highest = gradings["7"]["L5-S1"], gradings["7"]["T9-T10"]
    assert (lowest["pfirrmann"], lowest["modic"], lowest["upper_endplate"], lowest["lower_endplate"]) == (4, 1, 1, 0)
    assert (highest["lower_endplate"], highest["bulging"]) == (1, 1)
    assert "narrowing" not in highest


def test_every_column_fills_its_task():
    assert len({task.name for task in SPIDER_TASKS}) == len(COLUMNS) == 8
    for column in COLUMNS.values():
        assert set(column.label_of_value.values()) == set(range(column.task.num_grades))


def test_all_faults_of_a_table_are_reported_at_once(tmp_path):
    rows = [
        row(1, 1, **{"Pfirrman grade": "6"}),
        row(1, 2, Modic="x"),
        row(1, 3),
        row(1, 3),
        row(1, 10),
        row("", 4),
    ]
    write_table(tmp_path / "gradings.csv", rows)
    with pytest.raises(SpinejaxError) as error:
        read_gradings(tmp_path / "gradings.csv")
    assert "gradings.csv: 5 faults" in str(error.value)
    for fault in (
        "line 2: Pfirrman grade '6', expected 1, 2, 3, 4, 5",
        "line 3: Modic 'x'",
        "line 5: patient 1, IVD label 3 occurs twice",
        "line 6: IVD label '10', expected 0 to 9",
        "line 7: no patient",
    ):
        assert fault in str(error.value)


def test_unknown_and_missing_columns(tmp_path):
    rows = [{name.replace("Pfirrman ", "Pfirrmann "): value for name, value in row(1, 1).items()}]
    write_table(tmp_path / "gradings.csv", rows)
    with pytest.raises(SpinejaxError, match=r"(?s)no column 'Pfirrman grade'.*unknown column 'Pfirrmann grade'"):
        read_gradings(tmp_path / "gradings.csv")


@pytest.mark.parametrize("text", ["Patient,IVD label\n1", "", "\x00", '"'])
def test_file_that_is_no_table(tmp_path, text):
    (tmp_path / "gradings.csv").write_text(text)
    with pytest.raises(SpinejaxError, match=r"gradings\.csv"):
        read_gradings(tmp_path / "gradings.csv")


def test_ragged_row(tmp_path):
    write_table(tmp_path / "gradings.csv", [row(1, 1)])
    with open(tmp_path / "gradings.csv", "a") as file:
        file.write("1,2,0\n")
    with pytest.raises(SpinejaxError, match="line 3 has too many or too few cells"):
        read_gradings(tmp_path / "gradings.csv")


# Layout --------------------------------------------------------------------------------------------------------------


def test_wrong_folder_is_one_message(tmp_path):
    with pytest.raises(SpinejaxError, match=r"no images, no masks, no radiological_gradings\.csv, no overview\.csv"):
        jobs(tmp_path)


def test_missing_masks_are_named_before_any_work(tmp_path):
    root = write_root(tmp_path / "root")
    (root / "masks" / "3_t2_SPACE.mha").unlink()
    with pytest.raises(SpinejaxError, match=r"no mask for 1 of 5 t2_SPACE scans \(3_t2_SPACE\.mha\)"):
        jobs(root)


def test_patient_without_a_subset_is_refused(tmp_path):
    root = write_root(tmp_path / "root")
    write_table(root / "overview.csv", [{"new_file_name": f"{p}_t2_SPACE", "subset": "training"} for p in (1, 2, 3)])
    with pytest.raises(SpinejaxError, match=r"no row for 2 patients with scans \(4, 5\)"):
        jobs(root)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("1_t1", "training"), ("1_t2", "validation")], "patient 1 is in both subsets"),
        ([("1_t1", "test")], "subset 'test', expected training or validation"),
    ],
)
def test_faults_of_the_overview(tmp_path, rows, message):
    root = write_root(tmp_path / "root", patients=(1,))
    write_table(root / "overview.csv", [{"new_file_name": name, "subset": subset} for name, subset in rows])
    with pytest.raises(SpinejaxError, match=message):
        jobs(root)


def test_mask_on_another_grid_is_refused(tmp_path):
    root = write_root(tmp_path / "root", patients=(1,))
    write_mha(root / "masks" / "1_t2_SPACE.mha", block_spine(spacing_mm=(1.5, 1.4, 6.0), num_slices=3).mask)
    with pytest.raises(SpinejaxError, match=r"mask of 1_t2_SPACE\.mha.*own grid"):
        jobs(root)[0].cut()


# The official download -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def download(tmp_path_factory):
    """The layout of the official download: each patient has T1, T2 and T2 SPACE with masks, but 4 has no T2."""
    root = tmp_path_factory.mktemp("download")
    for folder in ("images", "masks"):
        (root / folder).mkdir()
    ordinary = block_spine(spacing_mm=(1.5, 1.4, 4.4), num_slices=11)
    thin = block_spine(spacing_mm=(1.3, 1.3, 0.9), num_slices=53)
    names = [f"{p}_{s}" for p in (1, 2, 3, 4) for s in ("t1", "t2", "t2_SPACE") if (p, s) != (4, "t2")]
    for name in names:
        spine, patient = thin if name.endswith("SPACE") else ordinary, int(name[0])
        for folder, scan in (("images", spine.scan), ("masks", spine.mask)):
            # The axes of SPIDER's files: slices first, then from front to back, then from foot to head.
            turn = np.eye(4)[:, [2, 1, 0, 3]]
            turn[:, 2], turn[0, 3] = -turn[:, 2], scan.voxels.shape[0] - 1
            voxels = scan.voxels.transpose(2, 1, 0)[:, :, ::-1]
            voxels = (
                voxels ** np.float32(0.8 + patient / 10) if folder == "images" else voxels
            )  # a contrast of their own
            write_mha(root / folder / f"{name}.mha", Scan(voxels, scan.affine @ turn, ""))
    (root / "images" / "._1_t2.mha").write_bytes(b"added by macOS")
    write_table(root / "radiological_gradings.csv", [row(p, disc) for p in (1, 2, 3, 4) for disc in (0, 1, 2, 3, 4)])
    subset = {"1": "validation"}
    rows = [{"new_file_name": name, "subset": subset.get(name[0], "training")} for name in names]
    write_table(root / "overview.csv", rows)
    return root


def test_the_official_download_is_read_as_it_comes(download, tmp_path, capsys):
    assert main(["spider", str(download), "--out", str(tmp_path / "out")]) == 0
    told = capsys.readouterr()
    assert "12 discs" in told.out
    assert "1 patients have no scan of the series t2: 4" in told.err
    assert "apart" not in told.err
    data = DataSet(tmp_path / "out")
    assert sorted(set(data.level)) == ["L2-L3", "L3-L4", "L4-L5", "L5-S1"]
    assert set(data.split[data.patient == data.patient[data.split == "test"][0]]) == {"test"}
    assert data.manifest["preprocessing"]["series"] == "t2"
    np.testing.assert_allclose(np.linalg.norm(data.affine[:, :3, 2], axis=1), 4.4)


@pytest.mark.parametrize(
    ("slices", "slab_mm", "told"), [("slabs", 3.6, "averaged to about 4 mm"), ("native", 0.9, "native")]
)
def test_all_series_with_t2_space_in_slabs(download, tmp_path, slices, slab_mm, told):
    arguments = ["--series", "t1", "t2", "t2_SPACE", "--slices", slices, "--out", str(tmp_path / "out")]
    assert main(["spider", str(download), *arguments]) == 0
    data = DataSet(tmp_path / "out")
    assert len(data) == 44
    assert told in data.manifest["preprocessing"]["slices"]
    spacing = np.linalg.norm(data.affine[:, :3, 2], axis=1)
    assert sorted(np.round(spacing, 3)) == [slab_mm] * 16 + [4.4] * 28
    patients = dict(zip(data.scan, data.patient, strict=True))
    splits = set(zip(data.patient, data.split, strict=True))
    assert len(patients) == 11
    assert len(splits) == 4  # all series of a patient are in one split


# Real scans ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared SPIDER scans are not on this machine")
def test_discs_of_real_scans_lie_in_the_middle_of_their_volumes():
    made = jobs(SHARED)
    assert len(made) == 29
    found = 0
    for job in sorted(made, key=lambda job: job.scan)[:4]:
        discs, _ = job.cut()
        found += len(discs)
        for disc in discs:
            rows, columns = np.nonzero(disc.region[:, :, 7] == 2)
            assert abs(np.median(rows) - 95.5) < 12, disc.level
            assert abs(np.median(columns) - 159.5) < 40, disc.level  # half of a wedge lies in front
    assert found >= 24
