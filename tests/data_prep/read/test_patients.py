"""Who the patient is: layouts as hospitals, archives and converters write them, and tags that contradict each other."""

from collections import defaultdict
from pathlib import Path

import pytest

from data_prep.read.patient_tags import Evidence, alike
from data_prep.read.patients import tell_apart
from spinejax.errors import SpinejaxError

TAGS = ("patient_id", "patient_name", "birth_date", "study")
ROOT = Path("/export")


def dicom(*rows):
    """Series by folder: (folder, PatientID, PatientName, PatientBirthDate, StudyInstanceUID), some optional."""
    return [
        Evidence(
            path=ROOT / folder / "IM1",
            folders=(ROOT / folder,),
            uid=f"1.2.{number}",
            **dict(zip(TAGS, tags, strict=False)),
        )
        for number, (folder, *tags) in enumerate(rows)
    ]


def volumes(*names):
    return [Evidence(path=ROOT / name) for name in names]


def groups(evidence, by="auto"):
    """Which series are one patient's, as sets of their numbers; what was assumed; what is contradictory."""
    people = tell_apart(evidence, [ROOT], by)
    found = defaultdict(set)
    for number, patient in enumerate(people.patients):
        assert patient
        found[patient].add(number)
    assert len(set(people.keys)) == len(people.keys)
    return list(map(sorted, found.values())), people.notes, people.contradictions


@pytest.fixture(autouse=True)
def paths_are_folders(monkeypatch):
    monkeypatch.setattr(Path, "is_dir", lambda path: path == ROOT)


TWO_SERIES_EACH = [[0, 1], [2, 3]]

LAYOUTS = {
    "a PACS export, UIDs as folder names": dicom(
        ("1.2.840.1/1.2.840.11", "7", "A^B", "", "1.2.840.1"),
        ("1.2.840.1/1.2.840.12", "7", "A^B", "", "1.2.840.1"),
        ("1.2.840.2/1.2.840.21", "8", "C^D", "", "1.2.840.2"),
        ("1.2.840.2/1.2.840.22", "8", "C^D", "", "1.2.840.2"),
    ),
    "TCIA": dicom(
        ("Spine-01/01-02-2000-NA-MRI-1/1.0-SAG T2-2", "Spine-01", "Spine-01", "", "1"),
        ("Spine-01/03-02-2001-NA-MRI-4/1.0-SAG T2-5", "Spine-01", "Spine-01", "", "2"),
        ("Spine-02/01-02-2000-NA-MRI-6/1.0-SAG T2-7", "Spine-02", "Spine-02", "", "3"),
        ("Spine-02/01-02-2000-NA-MRI-6/1.0-SAG T1-8", "Spine-02", "Spine-02", "", "3"),
    ),
    "CDs of one patient each": dicom(
        ("cd1/DICOM/PAT0/STU0/SER0", "4711", "A^B", "19500101", "1"),
        ("cd1/DICOM/PAT0/STU0/SER1", "4711", "A^B", "19500101", "1"),
        ("cd2/DICOM/PAT0/STU0/SER0", "4712", "C^D", "19600101", "2"),
        ("cd2/DICOM/PAT0/STU0/SER1", "4712", "C^D", "19600101", "2"),
    ),
    "BIDS": volumes(
        "sub-01/ses-01/anat/sub-01_ses-01_T2w.nii.gz",
        "sub-01/ses-02/anat/sub-01_ses-02_T2w.nii.gz",
        "sub-02/ses-01/anat/sub-02_ses-01_T2w.nii.gz",
        "sub-02/ses-02/anat/sub-02_ses-02_T2w.nii.gz",
    ),
    "BIDS, short names": volumes(
        "sub-01/ses-01/T2w.nii.gz", "sub-01/ses-02/T2w.nii.gz", "sub-02/ses-01/T2w.nii.gz", "sub-02/ses-02/T2w.nii.gz"
    ),
    "flat": volumes("a_t2.nii.gz", "a_stir.nii.gz", "b_t2.nii.gz", "b_stir.nii.gz"),
    "a folder a contrast": volumes("t1/0007.nii.gz", "t2/0007.nii.gz", "t1/0008.nii.gz", "t2/0008.nii.gz"),
    "a folder a patient": volumes("P1/T2.nii.gz", "P1/STIR.nii.gz", "P2/T2.nii.gz", "P2/STIR.nii.gz"),
    # https://github.com/nipy/heudiconv/issues/377
    "patient, then date, then kind of image": dicom(
        ("130S4883/20120103/anat", "", "", "", "1"),
        ("130S4883/20130506/anat", "", "", "", "2"),
        ("136S4517/20140506/anat", "", "", "", "3"),
        ("136S4517/20151104/anat", "", "", "", "4"),
    ),
    "patient, then series": volumes("P1/SAG_T2/sag.nii", "P1/SAG_T1/sag.nii", "P2/SAG_T2/sag.nii", "P2/SAG_T1/sag.nii"),
}


@pytest.mark.parametrize("layout", sorted(set(LAYOUTS) - {"patient, then date, then kind of image"}))
def test_usual_layouts_need_no_option(layout):
    found, notes, contradictions = groups(LAYOUTS[layout])
    assert found == TWO_SERIES_EACH
    assert notes == contradictions == []


@pytest.mark.parametrize("layout", sorted(set(LAYOUTS) - {"flat", "a folder a contrast"}))
def test_the_level_of_the_patients_folders_is_found(layout):
    """Where one level alone agrees with the tags; folders that are called after an image are no person's."""
    found, notes, contradictions = groups(LAYOUTS[layout], "folder")
    assert found == TWO_SERIES_EACH
    assert notes == contradictions == []


def test_folders_without_patient_ids_are_told_apart_by_their_studies():
    """PATIENT/SERIES, nothing but StudyInstanceUID: no study is torn apart."""
    rows = dicom(
        ("PAT0/4711", "", "", "", "1"),
        ("PAT0/4712", "", "", "", "1"),
        ("PAT1/4713", "", "", "", "2"),
        ("PAT1/4714", "", "", "", "2"),
    )
    assert groups(rows, "folder") == (TWO_SERIES_EACH, [], [])
    found, (note,), contradictions = groups(rows)
    assert found == TWO_SERIES_EACH
    assert contradictions == []
    assert note.startswith(
        "4 series have no PatientID that tells patients apart (''). By their StudyInstanceUID they are of 2"
    )


def test_studies_that_share_folders_are_told():
    found, (note,), contradictions = groups(LAYOUTS["patient, then date, then kind of image"])
    assert found == [[0], [1], [2], [3]]
    assert note.endswith("if each person has a folder. By their folders they would be of 2.")
    assert contradictions == []


def test_levels_that_both_could_be_the_patients_are_asked_about():
    rows = volumes("A/4711/t2.nii", "A/4712/t2.nii", "B/4713/t2.nii", "B/4714/t2.nii")
    for by in ("folder", "auto"):
        _, _, (contradiction,) = groups(rows, by)
        assert contradiction.startswith(
            "Which folders are patients' below /export? level 1 has 2 (A, B); level 2 has 4 (A/4711"
        )
        assert contradiction.endswith("Give --patients-by folder:1 or folder:2.")
    assert groups(rows, "folder:1") == (TWO_SERIES_EACH, [], [])
    assert groups(rows, "folder:2") == ([[0], [1], [2], [3]], [], [])


def test_keys_start_at_the_patients_folder_or_are_as_long_as_they_must():
    rows = volumes("P1/ses/t2.nii", "P2/ses/t2.nii", "P2/ses/x_y.nii")
    assert tell_apart(rows, [ROOT], "folder:1").keys == ["P1/ses/t2", "P2/ses/t2", "P2/ses/x_y"]
    assert tell_apart(rows, [ROOT], "auto").keys == ["P1/ses/t2", "P2/ses/t2", "x_y"]
    centres = volumes("A/01/t2.nii", "B/01/t2.nii", "B/02/t2.nii")
    people = tell_apart(centres, [ROOT], "folder:2")
    assert people.patients == ["A/01", "B/01", "02"]
    assert people.keys == ["A/01/t2", "B/01/t2", "02/t2"]


def test_a_level_that_tears_a_patient_apart_is_refused():
    rows = LAYOUTS["a PACS export, UIDs as folder names"]
    _, _, contradictions = groups(rows, "folder:2")
    assert "patient '7' is in the folders 1.2.840.1/1.2.840.11, 1.2.840.1/1.2.840.12." in contradictions[0]
    assert any("StudyInstanceUID '1.2.840.1' is in the folders" in line for line in contradictions)


def test_a_level_that_joins_patients_is_refused_unless_it_is_named():
    rows = dicom(("SAG_T2", "7", "", "", "1"), ("SAG_T2", "8", "", "", "2"), ("SAG_T1", "9", "", "", "3"))
    _, _, (contradiction,) = groups(rows, "folder")
    assert "Level 1: folder SAG_T2 holds the patients 7, 8. Give --patients-by auto" in contradiction
    found, (note,), contradictions = groups(rows, "folder:1")
    assert found == [[0, 1], [2]]
    assert "folder SAG_T2 holds the patients 7, 8." in note
    assert contradictions == []


def test_one_patient_id_for_all_does_not_forbid_a_named_level():
    rows = dicom(("P1", "STUDY", "", "", "1"), ("P2", "STUDY", "", "", "2"))
    found, (note,), contradictions = groups(rows, "folder:1")
    assert found == [[0], [1]]
    assert "patient 'STUDY' is in the folders P1, P2." in note
    assert contradictions == []
    found, (note,), _ = groups(rows)
    assert found == [[0, 1]]
    assert note.startswith("2 series of 2 studies are all of patient 'STUDY'. Give --patients-by study or folder")


@pytest.mark.parametrize(
    "anonymous",
    [
        "",
        "ANONYMOUS",
        "Anon",
        "anonymized",
        "0",
        "000000",
        "Unknown",
        "N/A",
        "NoID",
        "XXX",
        "de-identified",
        "^",
        "Anonymous^Patient",
    ],
)
def test_placeholders_are_nobody(anonymous):
    rows = dicom(*((f"p{study}", anonymous, anonymous, "", study) for study in "123"))
    found, (note,), contradictions = groups(rows)
    assert found == [[0], [1], [2]]
    assert f"({anonymous!r})" in note
    assert "of 3 people" in note
    assert contradictions == []


@pytest.mark.parametrize(
    "pseudonym", ["ANON{}", "anonymous_{}", "DEID-{}", "P{}", "{}", "X{}", "1.2.840.{}", "patient{}"]
)
def test_pseudonyms_are_somebody(pseudonym):
    """One person's two studies stay together (https://github.com/nipy/heudiconv/issues/280: a study was cut in two)."""
    one, other = pseudonym.format("0001"), pseudonym.format("0002")
    rows = dicom(("a", one, one, "", "1"), ("b", one, one, "", "2"), ("c", other, other, "", "3"))
    assert groups(rows) == ([[0, 1], [2]], [], [])


def test_names_and_other_series_stand_in_for_a_patient_id():
    rows = dicom(
        ("a", "7", "Miller^Ann", "19500101", "1"),
        ("b", "", "Miller^Ann", "19500101", "2"),  # by name
        ("c", "", "", "", "1"),  # by study
        ("d", "", "Miller^Ann", "19800101", "3"),  # a namesake
        ("e", "", "Jones^Bob", "", "4"),
        ("f", "", "Jones^Bob", "", "5"),
    )
    found, notes, contradictions = groups(rows)
    assert found == [[0, 1, 2], [3], [4, 5]]
    assert [note.partition("By their ")[2].partition(" they")[0] for note in notes] == [
        "study or name, as others,",
        "PatientName",
    ]
    assert contradictions == []


@pytest.mark.parametrize("ids", [("0007", "7"), ("P7", "p7"), ("P7", "P 7"), ("Müller", "MULLER")])
def test_spellings_of_one_id_are_one_person_with_a_word(ids):
    found, (note, *_), contradictions = groups(
        dicom(("a", ids[0], "", "", "1"), ("b", ids[1], "", "", "2"), ("c", "9"))
    )
    assert found == [[0, 1], [2]]
    assert f"PatientIDs {', '.join(sorted(ids))} are taken for one person" in note
    assert contradictions == []
    rows = dicom(("a", ids[0], "A^B", "1950"), ("b", ids[1], "C^D", "1960"))
    found, (note,), _ = groups(rows)
    assert found == [[0], [1]]
    assert "are taken for several people" in note
    assert groups(rows, "name")[0] == [[0], [1]]


def test_alike_leaves_signs_alone():
    assert alike("1-1") != alike("11")
    assert alike("sub-010") == alike("SUB-10")


CONTRADICTIONS = {
    "one id, two names and births": (
        dicom(("a", "7", "Miller^Ann", "19500101", "1"), ("b", "7", "Jones^Bob", "19600101", "2")),
        "PatientID '7': two names and two dates of birth. Give --patients-by name if",
        {"name": [[0, 1]], "study": [[0], [1]], "folder": [[0], [1]]},
    ),
    "one id, two names": (
        dicom(("a", "7", "Miller^Ann", "", "1"), ("b", "7", "Jones^Bob", "", "2")),
        "PatientID '7': two names with no part in common",
        {"name": [[0, 1]], "study": [[0], [1]]},
    ),
    "one study, two ids": (  # https://github.com/RSNA/anonymizer/issues/18
        dicom(("a", "7", "", "", "1"), ("b", "8", "", "", "1")),
        "StudyInstanceUID 1 has the PatientIDs 7, 8. Give --patients-by study if",
        {"name": [[0], [1]], "study": [[0, 1]]},
    ),
    "one name in two centres": (
        volumes("A/0007.nii", "B/0007.nii"),
        "Files of one name are in several folders: 0007 (A, B). Are they of one person, or of several?",
        {"name": [[0, 1]], "folder": [[0], [1]]},
    ),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_contradictions_are_refused_with_a_way_on(name):
    rows, message, ways = CONTRADICTIONS[name]
    _, _, contradictions = groups(rows)
    assert len(contradictions) == 1
    assert message in contradictions[0]
    for by, expected in ways.items():
        assert f"--patients-by {by}" in contradictions[0]
        found, _, left = groups(rows, by)
        assert (found, left) == (expected, [])


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (("Miller^Ann", "1950"), ("MILLER^ANN^^DR", "1950")),
        (("Miller^Ann", "19500101"), ("ANONYMOUS", "")),
        (("7", ""), ("Miller^Ann", "19500101")),  # an id in place of a name
        (("Ann Miller", ""), ("Miller^Ann", "")),
        (("PHANTOM, fourD", ""), ("PHANTOM^FourD^^", "")),  # https://github.com/commontk/CTK/issues/275
    ],
)
def test_a_name_may_be_written_in_two_ways(a, b):
    assert groups(dicom(("x", "7", *a, "1"), ("y", "7", *b, "1"))) == ([[0, 1]], [], [])


@pytest.mark.parametrize(
    ("a", "b", "what"),
    [
        (
            ("Miller^Ann", ""),
            ("Jones^Ann", ""),
            "names",
        ),  # by marriage; https://github.com/fli-iam/shanoir-ng/issues/3497
        (("Miller^Ann", "19500101"), ("Jones^Bea", "19500101"), "names"),
        (("Miller^Ann", "19500101"), ("Miller^Ann", "19510101"), "dates of birth"),
    ],
)
def test_two_names_or_two_births_of_one_id_are_told(a, b, what):
    found, (note,), contradictions = groups(dicom(("x", "7", *a, "1"), ("y", "7", *b, "1")))
    assert found == [[0, 1]]
    assert note == f"PatientID '7' is taken for one person, with two {what}."
    assert contradictions == []


def test_one_name_and_birth_under_two_ids_is_told():
    rows = [("a", "7", "Miller^Ann", "19500101"), ("b", "B7", "MILLER^ANN", "1950-01-01")]
    assert groups(dicom(*rows)) == ([[0], [1]], [], [])  # an anonymiser gave all one name
    found, (note,), _ = groups(dicom(*rows, ("c", "9", "Jones^Bob", "19600101")))
    assert found == [[0], [1], [2]]
    assert note.startswith("PatientIDs 7, B7 have one name, and no two dates of birth, and are taken for 2 people.")


def test_one_study_for_everybody_is_told():
    """Some anonymisers replace every identifier by one value."""
    rows = dicom(*((f"p{number}", "ANONYMOUS", "ANONYMOUS", "", "1.2.3") for number in range(3)))
    found, (note,), contradictions = groups(rows)
    assert found == [[0, 1, 2]]
    assert note.endswith(
        "they are of 1 people. Give --patients-by folder:1 if they are of several, each with a folder."
    )
    assert contradictions == []
    assert groups(rows, "folder:1")[0] == [[0], [1], [2]]


def test_a_word_on_the_image_makes_no_second_person():
    found, (note,), contradictions = groups(
        volumes("P001-T2.nii", "P001-STIR.nii", "P002-T2.nii", "MR-1.nii", "MR-2.nii")
    )
    assert found == [[0, 1], [2], [3], [4]]
    assert note.startswith("Files of P001-STIR, P001-T2 are taken for one person's, 'P001'.")
    assert contradictions == []


def test_dicom_and_volume_files_of_one_person():
    rows = dicom(("a", "0007", "", "", "1"), ("b", "9", "", "", "2")) + volumes("nifti/7_t2.nii", "nifti/9_t2.nii")
    found, (note,), _ = groups(rows)
    assert found == [[0, 2], [1, 3]]
    assert note.startswith("Files of 7 are taken for one person's, '0007'.")


@pytest.mark.parametrize("word", ["T2", "20200101", "img"])
def test_files_that_begin_with_no_patient_are_told(word):
    rows = volumes(f"{word}_001.nii", f"{word}_002.nii", "P3_T2.nii")
    found, (note,), contradictions = groups(rows)
    assert found == [[0, 1], [2]]
    assert f"2 of {word!r}. Give --patients-by name:2" in note
    assert contradictions == []
    assert groups(rows, "name:2")[0] == [[0], [1], [2]]


def test_a_study_is_no_person_where_patients_are_known():
    rows = dicom(("a", "7", "", "", "1"), ("b", "7", "", "", "2"), ("c", "8", "", "", "3"))
    _, _, (contradiction,) = groups(rows, "study")
    assert "patient '7' has 2 studies, and would be 2 people" in contradiction


def test_an_empty_id_is_no_name():
    _, _, (contradiction,) = groups_allowing_nobody(dicom(("a", "", "", "", "1")), "name")
    assert "1 series have an empty PatientID" in contradiction


def groups_allowing_nobody(evidence, by):
    people = tell_apart(evidence, [ROOT], by)
    return people.patients, people.notes, people.contradictions


def test_more_of_a_name_can_be_the_patient():
    rows = volumes("case_001_0000.nii.gz", "case_001_0001.nii.gz", "case_002_0000.nii.gz")
    _, (note,), _ = groups(rows)
    assert "3 scans are all of patient 'case'" in note
    assert "name:2" in note
    assert groups(rows, "name:2") == ([[0, 1], [2]], [], [])


def test_folders_called_after_images_are_no_patients_unless_they_are_named():
    rows = volumes("SAG_T2/p1.nii", "SAG_T2/p2.nii", "sag t1/p1.nii", "sag t1/p2.nii")
    _, _, (contradiction,) = groups(rows, "folder")
    assert contradiction.startswith("Folders that are called after images, not patients: 2 (SAG_T2, sag t1). Give")
    assert groups(rows) == ([[0, 2], [1, 3]], [], [])
    assert groups(rows, "folder:1") == ([[0, 1], [2, 3]], [], [])
    found, (note,), contradictions = groups(volumes("scan1/a.nii", "scan1/b.nii", "scan2/a.nii"), "folder")
    assert found == [[0, 1], [2]]
    assert (
        note == "Folders that are called after images, not patients: 2 (scan1, scan2). Each is taken for one patient."
    )
    assert contradictions == []


def test_one_folder_for_everybody_is_told():
    found, (note,), contradictions = groups(volumes("images/a_t2.nii", "images/b_t2.nii"), "folder")
    assert found == [[0, 1]]
    assert note.startswith("2 scans are all of patient 'images', by their folder.")
    assert contradictions == []


def test_two_data_sets_with_the_same_names_are_one_line():
    """Two centres that count their patients from 1: neither name nor folder is one person."""
    rows = volumes(*(f"{centre}/images/{number}_t2.nii" for centre in ("A", "B") for number in range(30)))
    _, _, (contradiction,) = groups(rows)
    assert "0_t2 (A/images, B/images), 1_t2 (A/images, B/images), 2_t2" in contradiction
    assert contradiction.endswith("Otherwise make a data set of each folder.")


def test_a_stray_file_beside_the_patients_folders_is_named():
    rows = volumes("P1/t2.nii", "P2/t2.nii", "t2.nii")
    for by in ("folder", "folder:1"):
        _, _, (contradiction,) = groups(rows, by)
        assert "/export/t2.nii lies" in contradiction


def test_a_series_in_the_folders_of_two_is_named():
    rows = [Evidence(path=ROOT / "P1/IM1", folders=(ROOT / "P1", ROOT / "P2"), uid="1.2")]
    _, _, (contradiction,) = groups(rows, "folder")
    assert "one series is in several folders, with /export/P1/IM1" in contradiction


@pytest.mark.parametrize("by", ["", "names", "folder:0", "folder:x", "study:1"])
def test_other_ways_are_refused(by):
    with pytest.raises(SpinejaxError, match=r"--patients-by .*: expected auto, name, name:2, folder"):
        tell_apart([], [ROOT], by)


# Groups and dates in names -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        ("AMC_001_T2.nii", "AMC_002_T2.nii", "UMC_001_T2.nii", "UMC_002_T2.nii"),
        ("control_01.nii", "control_02.nii", "other_01.nii"),
    ],
)
def test_numbers_after_a_groups_name_are_told(names):
    _, (note,), contradictions = groups(volumes(*names))
    assert "Give --patients-by name:2" in note
    assert repr(names[0].partition("_")[0]) in note
    assert contradictions == []


def test_several_images_of_one_patient_need_no_note():
    rows = volumes("110_t2.mha", "110_t2_SPACE.mha", "7_t1.mha", "7_run1.nii", "7_run2.nii", "sub-01_ses-1.nii")
    assert groups(rows)[1:] == ([], [])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("P001-20190101", "P001-20210101"),
        ("P001-visit1", "P001-visit2"),
        ("P001-ses1", "P001-ses2"),
        ("P001-baseline", "P001-followup"),
        ("P001-T2-1", "P001-T2-2"),
        ("Doe John 2019", "Doe John 2021"),
    ],
)
def test_examinations_of_one_patient_are_joined_with_a_note(one, other):
    found, notes, contradictions = groups(volumes(f"{one}.nii", f"{other}.nii", "P2_T2.nii"))
    assert sorted(map(len, found)) == [1, 2]
    assert len(notes) == 1
    assert contradictions == []


def test_names_of_nothing_but_an_image_are_not_joined_by_their_dates():
    found, _, _ = groups(volumes("MR-20190101.nii", "MR-20190102.nii", "P2_T2.nii"))
    assert len(found) == 3


def test_one_id_for_the_people_of_several_folders_is_told():
    rows = dicom(
        *((f"P{number}/T2", "RESEARCH", "", "", f"1.{number}") for number in (1, 2, 3)),
        ("P4/T2", "4711", "", "", "1.4"),
    )
    found, (note,), _ = groups(rows)
    assert found == [[0, 1, 2], [3]]
    assert note.startswith("Patient 'RESEARCH' has studies in the folders P1, P2, P3.")


def test_one_name_under_two_ids_is_told_without_births_too():
    rows = dicom(
        ("P1/2019", "111", "Doe^John", "", "1.1"),
        ("P1/2021", "222", "Doe^John", "", "1.2"),
        ("P2/2020", "333", "Roe^Jane", "", "1.3"),
    )
    found, (note,), _ = groups(rows)
    assert found == [[0], [1], [2]]
    assert note.startswith("PatientIDs 111, 222 have one name")


@pytest.mark.parametrize("word", ["Pseudonymized", "DUMMY", "ANONYMIZED^^^", "private", "Subject"])
def test_more_words_of_anonymisers_are_nobody(word):
    found, _, _ = groups(dicom(("a", word, "", "", "1.1"), ("b", word, "", "", "1.2")))
    assert found == [[0], [1]]
