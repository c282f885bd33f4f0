"""Sudirman's tables, and SPIDER and Sudirman's scans as one data set."""

import csv

import numpy as np
import pytest

from data_prep.__main__ import main
from data_prep.anatomy.vertebrae import bodies_from_spider_mask
from data_prep.dataset.pseudonyms import Pseudonyms
from data_prep.detector.detect import Detection
from data_prep.detector.training.cross_fitting import NUM_FOLDS, fold_of
from data_prep.detector.weights import member_without
from data_prep.read.metaimage import write_mha
from data_prep.read.scan import Scan
from data_prep.sources.pooled import POOLED_TASKS, Patient, splits_of
from data_prep.sources.sudirman import read_sudirman
from spinejax.data.dataset import DataSet
from spinejax.errors import SpinejaxError
from tests.block_spine import block_spine
from tests.data_prep.sources.test_spider import write_root

KEY = Pseudonyms(bytes(32))
NORMAL, DEGENERATED, BULGE = "Normal IVD", "Degenerative Disc Disease (DDD)", "Lumbar Disc Bulge (LDB)"
STENOSIS, SLIPPED = "Spinal Stenosis (SS)", "Spondylolisthesis"


def write_sudirman(root, boxes, grades=(("4", "4_t2", "L5-S1", "2"),)):
    """A row of `boxes` is scan, class, level, first and last row."""
    (root / "images").mkdir(parents=True, exist_ok=True)
    with open(root / "boxes.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["patient", "scan", "class", "row_min", "row_max", "col_min", "col_max", "level"])
        for scan, finding, level, first, last in boxes:
            table.writerow([scan.split("_")[0], scan, finding, first, last, 10, 60, level])
    with open(root / "labels.csv", "w", newline="") as file:
        csv.writer(file).writerows([["patient", "scan", "level", "pfirrmann"], *grades])
    return root


def test_findings_become_labels_of_their_discs(tmp_path):
    """A box of the canal has no level, and belongs to the disc at its height; what a box does not say is missing."""
    boxes = [
        ("4_t2", BULGE, "L5-S1", 200, 240),
        ("4_t2", NORMAL, "L4-L5", 150, 190),
        ("4_t2", DEGENERATED, "L3-L4", 100, 140),
        ("4_t2", STENOSIS, "", 205, 235),
        ("4_t2", SLIPPED, "", 140, 195),
    ]
    (patient, labels), *others = read_sudirman(write_sudirman(tmp_path, boxes)).values()
    assert (patient, others) == ("4", [])
    assert labels == {
        "L5-S1": {"pfirrmann": 1, "bulging": 1, "stenosis": 1, "spondylolisthesis": 0},
        "L4-L5": {"bulging": 0, "degenerated": 0, "stenosis": 0, "spondylolisthesis": 1},
        "L3-L4": {"degenerated": 1, "stenosis": 0, "spondylolisthesis": 0},
    }


def test_a_second_finding_of_a_disc_is_added_to_the_first(tmp_path):
    boxes = [("4_t2", BULGE, "L5-S1", 200, 240), ("4_t2", DEGENERATED, "", 202, 236)]
    ((_, labels),) = read_sudirman(write_sudirman(tmp_path, boxes)).values()
    assert labels["L5-S1"]["bulging"] == labels["L5-S1"]["degenerated"] == 1


def test_a_box_above_the_known_levels_is_of_no_disc(tmp_path):
    boxes = [("4_t2", NORMAL, "T8-T9", 0, 20), ("4_t2", NORMAL, "L5-S1", 200, 240)]
    ((_, labels),) = read_sudirman(write_sudirman(tmp_path, boxes, grades=())).values()
    assert set(labels) == {"L5-S1"}


@pytest.mark.parametrize(
    ("box", "grade", "fault"),
    [
        (("4_t2", "Fracture", "L5-S1", 1, 2), ("4", "4_t2", "L5-S1", "2"), "boxes.csv.*class 'Fracture'"),
        (("4_t2", NORMAL, "L5-S1", "high", 2), ("4", "4_t2", "L5-S1", "2"), "boxes.csv.*'high'"),
        (("4_t2", NORMAL, "L5-S1", 1, 2), ("4", "4_t2", "L5-S1", "6"), "labels.csv.*pfirrmann '6'"),
        (("4_t2", NORMAL, "L5-S1", 1, 2), ("4", "4_t2", "X1", "2"), "labels.csv.*level 'X1'"),
    ],
)
def test_faults_of_the_tables_are_named(tmp_path, box, grade, fault):
    with pytest.raises(SpinejaxError, match=f"(?s){fault}"):
        read_sudirman(write_sudirman(tmp_path, [box], [grade]))


def test_a_patients_split_depends_on_his_number_alone():
    names = [Patient(source, str(number)) for source in ("spider", "sudirman") for number in range(300)]
    patients = {"-".join(name): name for name in names}
    every = splits_of(patients)
    shares = {split: np.mean([each == split for each in every.values()]) for split in ("train", "validation", "test")}
    assert shares["test"] == 0
    assert 0.09 < shares["validation"] < 0.16
    some = dict(list(patients.items())[::7])
    assert splits_of(some) == {name: every[name] for name in some}
    for fold in range(NUM_FOLDS):
        splits = splits_of(patients, fold=fold, held_out=[Patient("spider", "7")])
        for name, patient in patients.items():
            tested = fold_of(*patient) == fold or patient == Patient("spider", "7")
            assert splits[name] == ("test" if tested else every[name])


def test_both_sources_become_one_data_set(tmp_path, monkeypatch):
    """Patients of the same number are two people; labels are missing where a source does not have the task."""
    spine = block_spine(spacing_mm=(1.5, 1.5, 6.0), num_slices=3)
    spider = write_root(tmp_path / "spider", series="t2")
    boxes = [(f"{number}_t2", BULGE, "L5-S1", 200, 240) for number in (4, 5)]
    sudirman = write_sudirman(tmp_path / "sudirman", boxes, [("4", "4_t2", "L5-S1", "3")])
    for number in (4, 5):
        voxels = spine.scan.voxels * (1 + number / 50)
        write_mha(sudirman / "images" / f"{number}_t2.mha", Scan(voxels, spine.scan.affine, ""))
    seen = []

    def found(scan, **options):
        seen.append(options["member"])
        bodies, _ = bodies_from_spider_mask(spine.mask)
        return Detection(bodies, {body.name: 1.0 for body in bodies}, [], False)

    monkeypatch.setattr("data_prep.detector.detect.detect", found)
    (tmp_path / "discs.key").touch(mode=0o600)
    (tmp_path / "discs.key").write_bytes(bytes(32))
    roots = ["--spider", str(spider), "--sudirman", str(sudirman)]
    status = main(["pooled", *roots, "--series", "t2", "--held-out", "spider/5", "--out", str(tmp_path / "discs")])
    assert status == 0
    data = DataSet(tmp_path / "discs")
    assert data.tasks == POOLED_TASKS
    assert sorted(seen) == sorted(member_without("sudirman", number) for number in ("4", "5"))
    assert set(data.patient) == {
        *(KEY.patient(str(number)) for number in range(1, 6)),
        *(KEY.patient(f"sudirman/{number}") for number in (4, 5)),
    }
    assert {each["source"] for each in data.manifest["scans"].values()} == {"spider", "sudirman"}
    assert set(data.patient[data.rows("test")]) == {KEY.patient("5")}
    (row,) = np.flatnonzero((data.patient == KEY.patient("sudirman/4")) & (data.level == "L5-S1"))
    labels = {task.name: int(label) for task, label in zip(data.tasks, data.labels[row], strict=True)}
    assert (labels["pfirrmann"], labels["bulging"], labels["modic"], labels["degenerated"]) == (2, 1, -1, -1)


def test_a_patient_who_is_not_there_cannot_be_held_out(tmp_path, capsys):
    spider = write_root(tmp_path / "spider", series="t2")
    sudirman = write_sudirman(tmp_path / "sudirman", [("4_t2", NORMAL, "L5-S1", 1, 2)])
    roots = ["--spider", str(spider), "--sudirman", str(sudirman), "--series", "t2", "--out", str(tmp_path / "discs")]
    for name, fault in (("spider/99", "no such patient"), ("7", "expected spider/NUMBER or sudirman/NUMBER")):
        assert main(["pooled", *roots, "--held-out", name]) == 2
        assert fault in capsys.readouterr().err
