"""Measuring SPIDER's and Sudirman's sets, on small copies of their folders with a drawn spine and without networks."""

import csv
import json
from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
import pytest

from data_prep.__main__ import main
from data_prep.anatomy.vertebrae import VertebralBody
from data_prep.detector import weights
from data_prep.detector.detect import Detection
from data_prep.detector.training.cross_fitting import NUM_FOLDS, fold_of
from data_prep.look import out_of_fold
from data_prep.look.out_of_fold import cases, measure, results, with_unseen_members
from data_prep.read.metaimage import write_mha
from spinejax.errors import SpinejaxError
from tests.block_spine import block_spine

DRAWN = block_spine(num_bodies=6, num_slices=3)
NAMES = ["T12", "L1", "L2", "L3", "L4", "L5", "S1"]
PATIENTS = [("spider", "1"), ("spider", "2"), ("sudirman", "4")]


def find(scan, *, weights, member):
    """Find the drawn spine, refuse patient 2's T2 slice, and tell by the doubt which member is asked."""
    if scan.name == "2_t2.mha":
        raise SpinejaxError(f"{scan.name}: no column of vertebral bodies was found.")
    unknown = np.full((2, 2), np.nan)
    corners = DRAWN.corners | {"S1": np.concatenate([DRAWN.corners["S1"][:2], unknown])}
    bodies = [VertebralBody(name, corners[name], (0, 3)) for name in NAMES]
    return Detection(bodies, {}, [], doubt=0.01 if member is None else member / 10)


@pytest.fixture
def roots(tmp_path):
    """SPIDER's and Sudirman's folders: a stack, two patients' slices (one without T1), and a slice with boxes."""
    spider, sudirman = tmp_path / "spider", tmp_path / "sudirman"
    for folder in (spider / "images", spider / "masks", sudirman / "images"):
        folder.mkdir(parents=True)
    for name in ("1_t2_SPACE", "1_t2", "1_t1", "2_t2"):
        write_mha(spider / "images" / f"{name}.mha", DRAWN.scan)
    write_mha(spider / "masks" / "1_t2_SPACE.mha", DRAWN.mask)
    write_mha(sudirman / "images" / "4_t2.mha", DRAWN.scan)
    extent = np.array(DRAWN.scan.voxels.shape[:2]) - 1
    points, boxes = [["patient", "file", "level", "relative_row", "relative_col"]], []
    for above, below in pairwise(NAMES[1:]):
        ends = np.concatenate([DRAWN.corners[above][2:], DRAWN.corners[below][:2]])
        place = (DRAWN.corners[above][2] + DRAWN.corners[below][1]) / 2 / extent
        points += [[patient, f"{patient}_t2.mha", f"{above}-{below}", *place] for patient in ("1", "2")]
        (top, left), (bottom, right) = ends.min(0), ends.max(0)
        boxes.append(["4", "4_t2", "Normal", top, bottom, left, right, f"{above}-{below}"])
    header = ["patient", "scan", "class", "row_min", "row_max", "col_min", "col_max", "level"]
    for path, rows in ((spider / "level_points.csv", points), (sudirman / "boxes.csv", [header, *boxes])):
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows(rows)
    return spider, sudirman


@pytest.fixture
def five(tmp_path):
    """Weights of five members that have each not seen their own fold's patients."""
    return weights_with(tmp_path / "five.npz", lambda source, patient: fold_of(source, patient))


def weights_with(path, unseen_by):
    folds = [
        [f"{source}/{patient}" for source, patient in PATIENTS if unseen_by(source, patient) == fold]
        for fold in range(NUM_FOLDS)
    ]
    weights.save(path, [{"layer": np.zeros(1, np.float32)} for _ in folds], {"folds": folds})
    return path


def measured_with(roots, path, num_workers=1):
    some = with_unseen_members(cases(*roots), path)
    return measure(some, weights=path, num_workers=num_workers, report=lambda line: None, find=find)


def test_each_patient_is_measured_with_the_member_that_has_not_seen_him(roots, five):
    found = results(measured_with(roots, five), weights=five)
    assert {name: len(one["scans"]) for name, one in found["sets"].items()} == {
        "stacks": 1,
        "t2": 2,
        "t1": 1,
        "sudirman": 1,
    }
    for one in found["sets"].values():
        for scan in one["scans"]:
            fold = fold_of(scan["source"], scan["patient"])
            assert scan["fold"] == fold
            assert scan["doubt"] == (None if scan["refused"] else fold / 10)
    assert found["out_of_fold"] is True
    assert found["weights_sha256"] == weights.weights_sum(five)
    assert found["sets"]["stacks"]["summary"]["bodies_found"]["value"] == 1
    assert found["sets"]["t1"]["summary"]["discs_found"]["value"] == 1
    assert found["sets"]["t2"]["summary"]["discs_found"]["value"] == 0.5  # one of two is refused
    assert found["sets"]["sudirman"]["summary"]["scans_levels_right"]["value"] == 1
    assert found["t1_over_t2"]["discs_found"] == {"value": 1.0, "low": 1.0, "high": 1.0, "n": 1}  # patient 1 has both


def test_a_patient_whom_his_member_has_seen_is_refused_by_name(roots, tmp_path):
    leaked = weights_with(tmp_path / "leaked.npz", lambda *who: (fold_of(*who) + (who == ("spider", "2"))) % NUM_FOLDS)
    with pytest.raises(SpinejaxError, match=r"spider/2\. Figures with them would not be out-of-fold"):
        with_unseen_members(cases(*roots), leaked)
    unlisted = weights_with(tmp_path / "unlisted.npz", lambda *who: -1 if who[0] == "sudirman" else fold_of(*who))
    with pytest.raises(SpinejaxError, match="sudirman/4"):
        with_unseen_members(cases(*roots), unlisted)


def test_weights_without_folds_are_refused(roots, tmp_path):
    weights.save(tmp_path / "one.npz", [{"layer": np.zeros(1, np.float32)}], {})
    with pytest.raises(SpinejaxError, match="--ensemble measures all"):
        with_unseen_members(cases(*roots), tmp_path / "one.npz")


def test_folders_without_a_truth_are_refused(tmp_path):
    with pytest.raises(SpinejaxError, match="no scan with a known truth"):
        cases(tmp_path, None)


@pytest.mark.slow
def test_results_do_not_depend_on_the_number_of_workers(roots, five):
    def timeless(measured):
        return [replace(one.accuracy, seconds=0.0) for one in measured]

    assert timeless(measured_with(roots, five)) == timeless(measured_with(roots, five, num_workers=2))


def test_the_command_writes_figures_and_sheets_without_paths(roots, five, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(out_of_fold, "measure", partial(measure, find=find))
    spider, sudirman = roots
    sets = ["detect-eval", "--spider", str(spider), "--sudirman", str(sudirman), "--weights", str(five)]
    figures, sheets = tmp_path / "figures.json", tmp_path / "sheets"
    assert main([*sets, "--out", str(figures), "--sheets", str(sheets)]) == 0
    printed = capsys.readouterr().out
    assert "unflagged_scans_levels_right" in printed
    assert all(name in printed for name in ("stacks", "t2", "t1", "sudirman"))
    names = [path.name for path in sorted(sheets.iterdir())]
    assert names == ["stacks-01.png", "sudirman-01.png", "t1-01.png", "t2-01.png", "wrong-01.png"]
    assert all((sheets / name).read_bytes().startswith(b"\x89PNG") for name in names)
    text = figures.read_text()
    assert "NaN" not in text
    assert ".mha" not in text
    assert str(tmp_path) not in text
    assert json.loads(text)["out_of_fold"] is True

    assert main([*sets, "--ensemble", "--out", str(figures)]) == 0
    together = json.loads(figures.read_text())
    assert together["out_of_fold"] is False
    assert "not out-of-fold" in together["measured"]
    assert all(scan["fold"] is None for one in together["sets"].values() for scan in one["scans"])


def test_the_command_measures_one_or_the_other(roots, five, tmp_path, capsys):
    where = ["--weights", str(five), "--out", str(tmp_path / "figures.json")]
    assert main(["detect-eval", str(roots[0]), "--spider", str(roots[0]), *where]) == 2
    assert "either PATHS with --masks" in capsys.readouterr().err
    assert main(["detect-eval", *where]) == 2
    assert "--spider ROOT" in capsys.readouterr().err
    assert (
        main(
            ["detect-eval", "--spider", str(roots[0]), "--weights", str(five), "--out", str(five.with_suffix(".json"))]
        )
        == 2
    )
    assert "belongs to the weights" in capsys.readouterr().err
