"""The table of networks trained in both precisions, from finished runs."""

import json

import pytest

from benchmarks import precision


def finished(folder, values):
    """A run as `train.py` and `evaluate.py` leave it, as far as the table reads it."""
    (folder / "export").mkdir(parents=True)
    (folder / "graded").mkdir()
    tasks = {name: {"mean_per_class_accuracy": {"value": value}} for name, value in values.items()}
    (folder / "graded" / "results.json").write_text(json.dumps({"tasks": tasks}))


def test_differences_are_paired_by_seed_with_students_interval(tmp_path, capsys):
    for seed, (plain, rounded) in enumerate([(0.80, 0.81), (0.90, 0.92), (0.70, 0.73)]):
        finished(tmp_path / f"float32-{seed}", {"narrowing": plain, "marrow": 0.5})
        finished(tmp_path / f"bfloat16-{seed}", {"narrowing": rounded, "marrow": 0.5})
    precision.main(precision.Arguments(data=tmp_path, train=tmp_path))
    rows = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines() if "│" in line]
    cells = {name.strip(): [cell.strip() for cell in rest] for name, *rest in rows}
    assert cells["float32"][0] == "80.0 (70.0 to 90.0)"
    # 2 points, standard error 1/√3, and 4.303 of these with two degrees of freedom.
    assert cells["difference"][0] == "+2.0 [-0.5, +4.5]"
    assert cells["difference"][2] == "+1.0 [-0.2, +2.2]"


def test_one_of_two_questions_is_asked(tmp_path):
    with pytest.raises(SystemExit, match="one of --checkpoint and --train"):
        precision.main(precision.Arguments(data=tmp_path))
