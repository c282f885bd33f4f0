import pytest

from data_prep.sources.labels import level_named, read_labels, read_tasks, write_labels
from spinejax.errors import SpinejaxError
from spinejax.tasks import PAPER_TASKS, Task


def table(path, text):
    path.write_text(text)
    return path


def test_cells_are_names_of_grades(tmp_path):
    labels = read_labels(
        table(
            tmp_path / "t.csv", "level, patient ,scan,pfirrmann,lower_marrow\nL5-S1,7,,5,abnormal\nL4-L5,7,s2,,normal\n"
        ),
        PAPER_TASKS,
    )
    assert [task.name for task in labels.tasks] == ["pfirrmann", "lower_marrow"]
    of_all = {"L5-S1": {"pfirrmann": 4, "lower_marrow": 1}}
    scans = [("7", "s1"), ("7", "s2"), ("8", "s3")]
    assert labels.of_scans(scans) == ([of_all, of_all | {"L4-L5": {"lower_marrow": 0}}, {}], [])
    assert labels.of_scans(scans[:1]) == ([of_all], ["7 s2"])


def test_written_table_reads_back(tmp_path):
    rows = [("p", "s", "L1-L2", {"pfirrmann": 3, "narrowing": -1, "upper_marrow": 1})]
    write_labels(tmp_path / "t.csv", rows, PAPER_TASKS)
    labels = read_labels(tmp_path / "t.csv", PAPER_TASKS)
    assert labels.of_scans([("p", "s")]) == ([{"L1-L2": {"pfirrmann": 3, "upper_marrow": 1}}], [])


def test_all_faults_are_reported_at_once(tmp_path):
    text = (
        "patient,scan,level,pfirrmann,bulging\n"
        "1,a,L5-S1,6,0\n1,a,L6-S1,1,0\n,a,L5-S1,1,0\n1,b,L4-L5,1,0\n1,b,L4-L5,2,0\n"
    )
    with pytest.raises(SpinejaxError) as error:
        read_labels(table(tmp_path / "t.csv", text), PAPER_TASKS)
    for fault in (
        "5 faults",
        "unknown column 'bulging', expected a task: pfirrmann, narrowing",
        "line 2: pfirrmann '6', expected 1, 2, 3, 4, 5",
        "line 3: level 'L6-S1', expected one of T9-T10",
        "line 4: no patient",
        "line 6: 1 b L4-L5 occurs twice",
    ):
        assert fault in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no column"),
        ("patient,scan,level\n1,a,L5-S1\n", "no column of a task"),
        (
            "patient,scan,pfirrmann\n1,a,1\n",
            "no column 'level'\n  columns found: 'patient', 'scan', 'pfirrmann'; expected names",
        ),
        ("patient|level|pfirrmann\n1|L5-S1|1\n", "no column 'level'(.|\n)*commas, semicolons or tabs"),
        ("patient,level,pfirrmann\n\n", "no row"),
        ("patient,level,pfirrmann\n7,L5-S1,2,0\n", "line 2 has too many or too few cells: 4, the first line has 3"),
        ("patient,level,,pfirrmann\n7,L5-S1,x,2\n", "line 2: a cell in a column without a name"),
        ('patient,level,pfirrmann\n7,"L5-S1,2\n', "not a table of text in columns"),
        ("PK\3\4", "a workbook of a spreadsheet program. Save its sheet as CSV"),
        ("patient,scan,level,pfirrmann,pfirrmann\n", "column 'pfirrmann' occurs twice"),
        ("patient,scan,level,pfirrmann\n1,a,L5-S1\n", "too many or too few cells"),
        ("\0\0", "not a comma-separated|no column"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path, text, message):
    with pytest.raises(SpinejaxError, match=message):
        read_labels(table(tmp_path / "t.csv", text), PAPER_TASKS)


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("patient,level,pfirrmann\n0007,L4-L5,2\n", "utf-8"),
        ("patient;level;pfirrmann\r\n0007;L4-L5;2\r\n", "utf-8-sig"),
        ("patient\tlevel\tpfirrmann\n0007\tL4-L5\t2\n", "utf-16"),
        ("patient\tlevel\tpfirrmann\n0007\tL4-L5\t2\n", "utf-16-le"),
        ("patient\tlevel\tpfirrmann\n0007\tL4-L5\t2\n", "utf-16-be"),
        ("sep=;\npatient;level;pfirrmann\n0007;L4-L5;2\n", "utf-8"),
        ("patient,scan,level,pfirrmann\n0007,,L4-L5,2\n", "utf-8"),
        ('"patient";"level";"pfirrmann"\n"0007";"L4-L5";"2,0"\n', "utf-8"),
        ("patient;level;pfirrmann;;\n0007;L4-L5;2;;\n;;;;\n\n", "utf-8"),
        ("patient,level,pfirrmann\n0007,L4-L5,2,,\n,,\n", "utf-8"),
        ("patient,level,pfirrmann\r0007,L4-L5,2.0\r", "utf-8"),
        ("Patient;LEVEL;Pfirrmann\n0007;L4-L5;2\n", "utf-8"),
    ],
)
def test_spreadsheets_of_all_countries_are_read(tmp_path, text, encoding):
    (tmp_path / "t.csv").write_bytes(text.encode(encoding))
    labels = read_labels(tmp_path / "t.csv", PAPER_TASKS)
    assert labels.rows == {("0007", ""): {"L4-L5": {"pfirrmann": 1}}}
    assert labels.notes == []


def test_latin_1_is_read_with_a_word(tmp_path):
    (tmp_path / "t.csv").write_bytes("patient;level;pfirrmann\nMüller;L4–L5;2\n".encode("cp1252"))
    labels = read_labels(tmp_path / "t.csv", PAPER_TASKS)
    assert labels.rows == {("Müller", ""): {"L4-L5": {"pfirrmann": 1}}}
    assert "not UTF-8, so it is read as Latin-1" in labels.notes[0]


@pytest.mark.parametrize(
    ("text", "level"),
    [
        *((text, "L4-L5") for text in ("L4/5", "L4-5", "L4/L5", "l4-l5", "L4_L5", "L4–L5", "L4 - L5", "L4L5", "L4 5")),
        *((text, "L5-S1") for text in ("L5/S1", "L5-S", "l5s1", "L5/S", "L5−S1")),
        *((text, "T12-L1") for text in ("T12-L1", "Th12/L1", "TH12 L1")),
        *((text, "T11-T12") for text in ("T11/12", "T11-T12")),
        *((text, None) for text in ("L4", "4-5", "L4-L6", "L6-S1", "L45", "L5-1", "L5", "S1", "L4-S1", "", "L4-L5-S1")),
    ],
)
def test_levels_may_be_written_in_many_ways(text, level):
    assert level_named(text) == level


@pytest.mark.parametrize("grade", ["III", "Grade 3", "2.5", "6", "3-4", "NA", "²"])
def test_what_is_no_grade_is_refused_with_what_is_expected(tmp_path, grade):
    with pytest.raises(SpinejaxError, match=f"line 2: pfirrmann '{grade}', expected 1, 2, 3, 4, 5"):
        read_labels(table(tmp_path / "t.csv", f"patient,level,pfirrmann\n1,L5-S1,{grade}\n"), PAPER_TASKS)


def test_one_level_written_in_two_ways_occurs_twice(tmp_path):
    with pytest.raises(SpinejaxError, match="line 3: 1 L4-L5 occurs twice"):
        read_labels(table(tmp_path / "t.csv", "patient,level,pfirrmann\n1,L4-L5,1\n1,L4/5,2\n"), PAPER_TASKS)


def test_a_scan_may_be_named_by_the_end_of_its_key(tmp_path):
    labels = read_labels(table(tmp_path / "t.csv", "patient,scan,level,pfirrmann\nP1,T2,L4-L5,1\n"), PAPER_TASKS)
    assert labels.of_scans([("P1", "P1/T2"), ("P2", "P2/T2")]) == ([{"L4-L5": {"pfirrmann": 0}}, {}], [])
    with pytest.raises(SpinejaxError, match="scan 'T2' of patient 'P1' could be P1/a/T2, P1/b/T2"):
        labels.of_scans([("P1", "P1/a/T2"), ("P1", "P1/b/T2")])
    text = "patient,scan,level,pfirrmann\nP1,T2,L4-L5,1\nP1,P1/T2,L4-L5,2\n"
    with pytest.raises(SpinejaxError, match="'P1/T2' has rows as 'P1/T2' and as 'T2'"):
        read_labels(table(tmp_path / "t.csv", text), PAPER_TASKS).of_scans([("P1", "P1/T2")])


def test_splits_come_from_their_column(tmp_path):
    text = "patient,level,pfirrmann,split\n1,L4-L5,1,train\n1,L5-S1,1,\n2,L4-L5,1,Val\n3,L4-L5,1,test\n4,L4-L5,1,\n"
    labels = read_labels(table(tmp_path / "t.csv", text), PAPER_TASKS)
    assert labels.splits == {"1": "train", "2": "validation", "3": "test"}
    for row, fault in (
        ("1,L3-L4,1,test", "patient 1 is in train and in test"),
        ("5,L4-L5,1,A", "split 'A', expect"),
    ):
        with pytest.raises(SpinejaxError, match=f"line 7: {fault}"):
            read_labels(table(tmp_path / "t.csv", text + row), PAPER_TASKS)


def test_other_tasks_come_from_a_file(tmp_path):
    path = table(tmp_path / "tasks.json", '[{"name": "modic", "grades": ["0", "1", "2", "3"]}]')
    assert read_tasks(path) == (Task("modic", ("0", "1", "2", "3")),)
    assert read_tasks(None) == PAPER_TASKS
    for text in ("{", "[]", '[{"name": "Modic", "grades": ["0", "1"]}]', '{"a": 1}', "[1]"):
        with pytest.raises(SpinejaxError, match=r"--tasks .*tasks\.json: "):
            read_tasks(table(path, text))
