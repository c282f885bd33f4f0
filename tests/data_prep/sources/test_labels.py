import pytest

from data_prep.sources.labels import read_labels, read_tasks, write_labels
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
    assert labels.of("7", "s1") == {"L5-S1": {"pfirrmann": 4, "lower_marrow": 1}}
    assert labels.of("7", "s2") == {"L5-S1": {"pfirrmann": 4, "lower_marrow": 1}, "L4-L5": {"lower_marrow": 0}}
    assert labels.of("8", "s1") == {}
    assert labels.without_scan([("7", "s1")]) == ["7 s2"]


def test_written_table_reads_back(tmp_path):
    rows = [("p", "s", "L1-L2", {"pfirrmann": 3, "narrowing": -1, "upper_marrow": 1})]
    write_labels(tmp_path / "t.csv", rows, PAPER_TASKS)
    assert read_labels(tmp_path / "t.csv", PAPER_TASKS).of("p", "s") == {"L1-L2": {"pfirrmann": 3, "upper_marrow": 1}}


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
        ("patient,level,pfirrmann\n1,L5-S1,1\n", "no column 'scan'"),
        ("patient,scan,level,pfirrmann,pfirrmann\n", "column 'pfirrmann' occurs twice"),
        ("patient,scan,level,pfirrmann\n1,a,L5-S1\n", "too many or too few cells"),
        ("\0\0", "not a comma-separated|no column"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path, text, message):
    with pytest.raises(SpinejaxError, match=message):
        read_labels(table(tmp_path / "t.csv", text), PAPER_TASKS)


def test_other_tasks_come_from_a_file(tmp_path):
    path = table(tmp_path / "tasks.json", '[{"name": "modic", "grades": ["0", "1", "2", "3"]}]')
    assert read_tasks(path) == (Task("modic", ("0", "1", "2", "3")),)
    assert read_tasks(None) == PAPER_TASKS
    for text in ("{", "[]", '[{"name": "Modic", "grades": ["0", "1"]}]', '{"a": 1}', "[1]"):
        with pytest.raises(SpinejaxError, match=r"--tasks .*tasks\.json: "):
            read_tasks(table(path, text))
