import re

import numpy as np
import pytest
from scipy import stats

from data_prep.anatomy.discs import DiscVolume
from data_prep.dataset import label_levels
from data_prep.dataset.label_levels import DOUBT, LabelledScan, appearance, compare
from data_prep.sources.phantoms import phantom_jobs
from spinejax.geometry import INTENSITY_ONE, VOLUME_SHAPE
from spinejax.tasks import LEVELS, PAPER_TASKS, Task

TASKS = (Task("pfirrmann", ("1", "2", "3", "4", "5")), Task("narrowing", ("absent", "present")))
LUMBAR = LEVELS[-6:]


def scans(num_patients=40, *, noise=0.5, levels=LUMBAR, seed=0):
    """Scans whose discs look like their grades: two of 56 numbers, and noise."""
    rng = np.random.default_rng(seed)
    made = []
    for patient in range(num_patients):
        labels = {level: {"pfirrmann": int(rng.integers(5)), "narrowing": int(rng.integers(2))} for level in levels}
        looks = {level: noise * rng.standard_normal(56).astype(np.float32) for level in levels}
        for level, grades in labels.items():
            looks[level][:2] += grades["pfirrmann"], 3 * grades["narrowing"]
        made.append(LabelledScan(f"scan{patient:02d}", f"p{patient:02d}", labels, looks))
    return made


def moved(scan, by):
    """The scan with each label `by` levels further down; those that leave the lumbar spine are lost."""
    labels = {
        LEVELS[place]: scan.labels[level] for level in scan.labels if (place := LEVELS.index(level) + by) < len(LEVELS)
    }
    return LabelledScan(scan.name, scan.patient, labels, scan.appearance)


def doubted(notes):
    return [note.partition(":")[0] for note in notes if " may be one level too " in note]


def test_labels_that_are_right_are_not_doubted():
    notes = compare(scans(), TASKS)
    assert doubted(notes) == []
    assert len(notes) == 1
    assert notes[0].startswith("the labels of 40 scans were compared with what their discs look like; doubtful: 0.")


def test_labels_one_level_too_low_are_doubted():
    made = scans()
    made[7] = moved(made[7], 1)
    notes = compare(made, TASKS)
    assert doubted(notes) == ["scan07"]
    assert (
        "scan07: its labels may be one level too low: they fit better if the disc named L4-L5 has those of L5-S1"
        in notes[0]
    )
    total, looks, counts = map(float, re.findall(r"(?:evidence|appearance|counts) (-?[\d.]+)", notes[0]))
    assert total > DOUBT
    assert total == pytest.approx(looks + counts, abs=0.11)
    for advice in ("Look at the scan", "leave it out", "correct the table", "--corners", "--lowest-level"):
        assert advice in notes[0]


def test_labels_one_level_too_high_are_doubted():
    """The table calls the lowest disc L4-L5, so that L5-S1 has no label."""
    made = scans()
    made[3] = moved(made[3], -1)
    notes = compare(made, TASKS)
    assert doubted(notes) == ["scan03"]
    assert "one level too high: they fit better if the disc named L5-S1 has those of L4-L5" in notes[0]


def test_a_lowest_disc_that_was_just_not_graded_is_no_reason_for_doubt():
    made = scans()
    labels = {level: grades for level, grades in made[3].labels.items() if level != "L5-S1"}
    made[3] = LabelledScan("scan03", "p03", labels, made[3].appearance)
    assert doubted(compare(made, TASKS)) == []


def test_counts_alone_do_not_make_doubt():
    """All other scans are graded up to the highest disc that was found. In these the grades say nothing."""
    made = scans(200)
    same = {level: {"pfirrmann": 2, "narrowing": 0} for level in LUMBAR[1:]}
    looks = dict.fromkeys(LUMBAR, np.zeros(56, np.float32))
    made[5] = LabelledScan("scan05", "p05", same, looks)
    data = label_levels._arrange(made, TASKS)
    fit = {offset: np.zeros(len(data.scan)) for offset in range(-2, 3)}
    evidence = label_levels._evidence(data, fit, 1)[:, 5]
    assert evidence[0] == 0
    assert 3 < evidence[1] <= DOUBT


def test_grades_of_three_levels_are_enough_if_appearance_is_clear():
    made = scans(40, noise=0.2)
    three = LUMBAR[-3:]
    made = [LabelledScan(s.name, s.patient, {level: s.labels[level] for level in three}, s.appearance) for s in made]
    changing = {"L3-L4": 0, "L4-L5": 4, "L5-S1": 0}
    looks = {level: look.copy() for level, look in made[9].appearance.items()}
    for level, grade in changing.items():
        looks[level][:2] = grade, 0
    labels = {level: {"pfirrmann": grade, "narrowing": 0} for level, grade in changing.items()}
    made[9] = LabelledScan("scan09", "p09", labels, looks)
    assert doubted(compare(made, TASKS)) == []
    made[9] = moved(made[9], -1)
    assert doubted(compare(made, TASKS)) == ["scan09"]


def test_a_scan_does_not_judge_itself():
    """Predictions for a patient are those of a fit to all others."""
    made = scans(30)
    data = label_levels._arrange(made, TASKS)
    own = data.patient[data.scan] == 4
    standard = (data.features - data.features.mean(0)) / (data.features.std(0) + 1e-6)
    inputs, grades = np.column_stack([np.ones(len(own)), standard]), data.grades_of_discs(0)
    penalty = np.diag([0.0, *[label_levels._PENALTY * len(own)] * 56])
    others = inputs[~own]
    weights = np.linalg.solve(others.T @ others + penalty, others.T @ grades[~own])
    np.testing.assert_allclose(label_levels._predicted(data)[own], inputs[own] @ weights, atol=1e-9)


def test_two_series_of_one_patient_are_left_out_together():
    made = scans(40)
    made[7], made[8] = (
        moved(LabelledScan(f"scan0{number}", "p07", made[7].labels, made[7].appearance), 1) for number in (7, 8)
    )
    assert doubted(compare(made, TASKS)) == ["scan07", "scan08"]


def test_notes_do_not_depend_on_the_order_of_scans():
    made = scans()
    made[7], made[3] = moved(made[7], 1), moved(made[3], -1)
    assert compare(made[::-1], TASKS) == compare(made, TASKS)


def test_the_share_of_planted_shifts_is_told_with_its_exact_interval():
    clear, unclear = compare(scans(noise=0.1), TASKS)[-1], compare(scans(noise=3), TASKS)[-1]
    pattern = r"(\d+) of 40 \((\d+) %, 95 % interval (\d+) to (\d+)\) if their labels were one level too (low|high)"
    shares = [re.findall(pattern, note) for note in (clear, unclear)]
    assert [len(one) for one in shares] == [2, 2]
    for count, share, low, high, _ in shares[0] + shares[1]:
        exact = stats.beta.ppf([0.025, 0.975], [int(count), int(count) + 1], [41 - int(count), 40 - int(count)])
        assert int(share) == pytest.approx(2.5 * int(count), abs=0.51)
        assert [int(low), int(high)] == pytest.approx(100 * np.nan_to_num(exact, nan=1.0), abs=0.51)
    assert min(int(one[0]) for one in shares[0]) > 35 > max(int(one[0]) for one in shares[1])


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (scans(19), "114 discs of 19 patients are graded, 100 of 20 are needed"),
        (scans(25, levels=LUMBAR[-3:]), "75 discs of 25 patients are graded, 100 of 20 are needed"),
        (
            [LabelledScan(s.name, s.patient, {le: {"pfirrmann": 1} for le in LUMBAR}, s.appearance) for s in scans()],
            "the graded discs all have the same grades, or no task in common",
        ),
        (
            [
                LabelledScan(s.name, s.patient, s.labels, dict.fromkeys(LUMBAR, np.ones(56, np.float32)))
                for s in scans()
            ],
            "discs of one grade look no more alike than any",
        ),
    ],
)
def test_where_labels_cannot_be_compared_a_note_says_why(made, reason):
    assert compare(made, TASKS) == [f"labels were not compared with what their discs look like: {reason}."]


def test_nothing_is_said_without_labels():
    assert compare([], TASKS) == []
    assert compare([LabelledScan(s.name, s.patient, {}, s.appearance) for s in scans()], TASKS) == []
    unlabelled = {"L5-S1": {"pfirrmann": -1}}
    assert compare([LabelledScan(s.name, s.patient, unlabelled, s.appearance) for s in scans()], TASKS) == []


def test_scans_without_discs_and_rare_tasks_are_passed_over():
    made = scans()
    rare = Task("rare", ("no", "yes"))
    first = made[0].labels | {"L5-S1": made[0].labels["L5-S1"] | {"rare": 1}}
    made[0] = LabelledScan(made[0].name, made[0].patient, first, made[0].appearance)
    made.append(LabelledScan("failed", "failed", made[1].labels, {}))
    assert compare(made, (*TASKS, rare)) == compare(scans(), TASKS)


def test_two_tasks_that_say_the_same_are_no_more_evidence_than_one():
    made = [
        LabelledScan(
            s.name,
            s.patient,
            {level: grades | {"again": grades["pfirrmann"]} for level, grades in s.labels.items()},
            s.appearance,
        )
        for s in scans(noise=2)
    ]
    once = label_levels._arrange(made, TASKS)
    twice = label_levels._arrange(made, (*TASKS, Task("again", TASKS[0].grades)))
    fits = [label_levels._fit(data) for data in (once, twice)]
    np.testing.assert_allclose(fits[0][0].sum(), fits[1][0].sum(), rtol=0.1)


def test_appearance_is_the_mean_of_patches_around_the_centre():
    volume = np.zeros(VOLUME_SHAPE, np.uint16)
    volume[64:72, 104:120, 6:9] = INTENSITY_ONE  # the first patch
    volume[64:128, 104:216, :6] = 7  # slices that are not used
    one = appearance(DiscVolume("L4-L5", volume, np.eye(4), (0, 15)))
    assert one.dtype == np.float32
    np.testing.assert_allclose(one, [1, *[0] * 55])


@pytest.mark.parametrize(
    ("slices", "expected"), [((7, 8), 0.5), ((0, 8), 0.25), ((7, 15), 0.25), ((9, 12), 0), ((2, 5), 0)]
)
def test_appearance_is_not_diluted_by_slices_that_a_disc_has_not(slices, expected):
    volume = np.zeros(VOLUME_SHAPE, np.uint16)
    volume[:, :, 7] = INTENSITY_ONE // 2
    one = appearance(DiscVolume("L4-L5", volume, np.eye(4), slices))
    np.testing.assert_allclose(one, expected, atol=1e-4)


def test_a_shift_in_phantoms_is_found():
    made = []
    for job in phantom_jobs(20, seed=0):
        discs, _ = job.cut()
        made.append(LabelledScan(job.name, job.patient, job.labels, {disc.level: appearance(disc) for disc in discs}))
    assert doubted(compare(made, PAPER_TASKS)) == []
    shifted = [*made[:6], moved(made[6], 1), *made[7:]]
    assert doubted(compare(shifted, PAPER_TASKS)) == [made[6].name]
