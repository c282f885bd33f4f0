"""`evaluate.py --compare`: its JSON, its page in a browser, and what it refuses."""

import csv
import json
import re

import numpy as np
import pytest

from spinejax.commands import evaluate
from spinejax.errors import SpinejaxError
from spinejax.inference import hotspots, predict
from spinejax.metrics import grading
from spinejax.metrics.comparison import mcnemar
from tests.browser import Page, chromium_driver
from tests.report.axe import needs_axe, violations

TASKS = {"pfirrmann": ("1", "2", "3", "4", "5"), "modic": ("absent", "present")}
LEVELS = ("L3-L4", "L4-L5", "L5-S1")


def evaluation(folder, *, seed, data="d" * 64, discs=None, tasks=TASKS, labels=True, table_only=False, views=54):
    """Write an evaluation of ten patients with random grades; the labels are the same for every seed."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    lines = []
    all_discs = discs or [(f"p{n}", f"p{n}-t2", level) for n in range(10) for level in LEVELS]
    for number, (patient, scan, level) in enumerate(all_discs):
        line = {"patient": patient, "scan": scan, "level": level}
        for task, grades in tasks.items():
            label, chances = (3 * number + number // 4) % len(grades), rng.dirichlet(np.ones(len(grades)))
            line[f"{task}_label"] = grades[label] if labels else ""
            line[f"{task}_grade"] = grades[chances.argmax()]
            if not table_only:
                line |= {f"{task}_p_{grade}": f"{p:.6f}" for grade, p in zip(grades, chances, strict=True)}
                line[f"{task}_spread"] = "0.01"
        lines.append(line)
    with open(folder / "predictions.csv", "w", newline="") as file:
        table = csv.DictWriter(file, list(lines[0]))
        table.writeheader()
        table.writerows(lines)
    if not table_only:
        about = {"split": "test", "num_views": views, "average": "probabilities", "step": 7, "data": data}
        about["network"] = {"name": f"network {seed}", "weights": "0" * 64, "trained_on": None}
        (folder / "results.json").write_text(json.dumps(about | {"tasks": {}}))
    return lines


def compare(a, b, **options):
    evaluate.main(evaluate.Arguments(compare=(a, b), **options))


@pytest.fixture
def pair(tmp_path):
    lines = [evaluation(tmp_path / name, seed=seed) for name, seed in (("a", 1), ("b", 2))]
    return tmp_path / "a", tmp_path / "b", *lines


def test_the_json_has_paired_differences_tests_and_every_disc_that_changed(pair, tmp_path, capsys):
    a, b, ours, theirs = pair
    compare(a, b, out=tmp_path / "out")
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert (found["discs"], found["patients"]) == (30, 10)
    assert found["a"]["network"]["name"] == "network 1"
    assert found["b"]["data"] == "d" * 64
    patients = np.array([line["patient"] for line in ours])
    for task, grades in TASKS.items():
        labels, one, other = (
            np.array([grades.index(line[f"{task}_{column}"]) for line in lines])
            for lines, column in ((ours, "label"), (ours, "grade"), (theirs, "grade"))
        )
        entry = found["tasks"][task]
        counts = [grading.patient_confusions(labels, grades_, patients, len(grades)) for grades_ in (other, one)]
        for name in ("mean_per_class_accuracy", "kappa", *(["within_one"] if len(grades) > 2 else [])):
            assert entry[name]["difference"] == grading.difference(getattr(grading, name), *counts).to_json()
        assert ("within_one" in entry) == (len(grades) > 2)
        assert entry["mcnemar"] == vars(mcnemar(one == labels, other == labels))
        assert entry["changed"] == np.sum(one != other)
    told = {(each["scan"], each["level"], each["task"], each["a"], each["b"]) for each in found["changed"]}
    assert told == {
        (line["scan"], line["level"], task, line[f"{task}_grade"], other[f"{task}_grade"])
        for line, other in zip(ours, theirs, strict=True)
        for task in TASKS
        if line[f"{task}_grade"] != other[f"{task}_grade"]
    }
    assert "over discs" in found["how"]
    printed = capsys.readouterr().out
    for words in ("A: network 1, 54 views", "McNemar", "Agreement between A and B", "Research use only"):
        assert words in printed


def test_a_grade_has_its_own_probability_and_the_rater_is_named(tmp_path, capsys):
    for name, seed in (("a", 1), ("b", 2)):
        evaluation(tmp_path / name, seed=seed)
    table, results = tmp_path / "b" / "predictions.csv", tmp_path / "b" / "results.json"
    with open(table, newline="") as file:
        lines = list(csv.DictReader(file))
    task, grades = next(iter(TASKS.items()))
    for line in lines:
        line[f"{task}_grade"] = min(grades, key=lambda grade: float(line[f"{task}_p_{grade}"]))
    with open(table, "w", newline="") as file:
        written = csv.DictWriter(file, list(lines[0]))
        written.writeheader()
        written.writerows(lines)
    results.write_text(json.dumps(json.loads(results.read_text()) | {"rater": "someone"}))
    compare(tmp_path / "a", tmp_path / "b", out=tmp_path / "out")
    assert "B: network 2, 54 views, as someone grades" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())["changed"]
    lowest = {
        (line["scan"], line["level"]): min(float(line[f"{task}_p_{grade}"]) for grade in grades) for line in lines
    }
    changed = [each for each in found if each["task"] == task]
    assert changed
    for each in changed:
        assert each["b_p"] == pytest.approx(lowest[each["scan"], each["level"]], abs=1e-4)


def test_nothing_is_computed_on_a_device(pair, tmp_path, monkeypatch):
    for module, name in ((predict, "predict"), (hotspots, "stream"), (evaluate.runtime, "set_up")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("a comparison needs no network"))
    compare(*pair[:2], report=tmp_path / "page")
    assert {path.name for path in (tmp_path / "page").iterdir()} == {"comparison.json", "index.html"}


def test_discs_are_matched_by_scan_and_level_whatever_their_order(pair, tmp_path, capsys):
    a, b, ours, _ = pair
    compare(a, b, out=tmp_path / "all")
    some = [(line["patient"], line["scan"], line["level"]) for line in ours[:20]]
    evaluation(tmp_path / "some", seed=2, discs=some)  # the same random grades as B's first twenty
    with open(tmp_path / "some" / "predictions.csv", newline="") as file:
        header, *rows = list(csv.reader(file))
    with open(tmp_path / "some" / "predictions.csv", "w", newline="") as file:
        csv.writer(file).writerows([header, *reversed(rows)])
    compare(a, tmp_path / "some", out=tmp_path / "fewer")
    found, before = (json.loads((tmp_path / name / "comparison.json").read_text()) for name in ("fewer", "all"))
    assert found["discs"] == 20
    kept = {(scan, level) for _, scan, level in some}
    assert found["changed"] == [each for each in before["changed"] if (each["scan"], each["level"]) in kept]
    assert "10 discs are in A alone" in capsys.readouterr().out


def test_evaluations_without_a_common_disc_are_refused_with_both_digests(pair, tmp_path):
    evaluation(tmp_path / "c", seed=1, data="c" * 64, discs=[("q0", "q0-t2", "L5-S1")])
    with pytest.raises(SpinejaxError, match=f"share no disc.*{'d' * 64}.*{'c' * 64}"):
        compare(pair[0], tmp_path / "c", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_second_readers_table_needs_no_probabilities(pair, tmp_path, capsys):
    evaluation(tmp_path / "reader", seed=3, table_only=True)
    compare(pair[0], tmp_path / "reader", out=tmp_path / "out")
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert found["b"]["name"] == "a reader"
    assert all(each["b_p"] is None and each["a_p"] > 0 for each in found["changed"])
    assert found["tasks"]["pfirrmann"]["mcnemar"]["only_b"] >= 0
    assert "B: a reader" in capsys.readouterr().out
    compare(pair[0], tmp_path / "reader" / "predictions.csv", out=tmp_path / "file")
    assert json.loads((tmp_path / "file" / "comparison.json").read_text())["tasks"] == found["tasks"]


def test_tasks_that_cannot_be_compared_are_told(pair, tmp_path, capsys):
    evaluation(
        tmp_path / "c", seed=3, tasks={"pfirrmann": ("1", "2"), "modic": TASKS["modic"], "bulging": ("no", "yes")}
    )
    compare(pair[0], tmp_path / "c", out=tmp_path / "out")
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert set(found["tasks"]) == {"modic"}
    assert found["notes"] == ["pfirrmann: A has the grades 1, 2, 3, 4, 5, B has 1, 2.", "bulging: only B graded it."]
    assert found["notes"][0] in " ".join(capsys.readouterr().out.split())


def test_control_characters_of_a_name_are_escapes_on_the_terminal(pair, tmp_path, capsys):
    results = pair[1] / "results.json"
    results.write_text(results.read_text().replace("network 2", "\\u001b[31mnetwork\\nA: forged"))
    compare(*pair[:2], out=tmp_path / "out")
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert "B: \\x1b[31mnetwork\\nA: forged, 54 views" in printed


def edit(folder, old, new):
    path = folder / "predictions.csv"
    path.write_text(path.read_text().replace(old, new, 1))


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda b: (b / "predictions.csv").unlink(), r"b: no predictions\.csv in it"),
        (lambda b: edit(b, "scan,", "sacn,"), "has no column scan"),
        (lambda b: edit(b, "p0-t2,L4-L5", "p0-t2,L3-L4"), "scan p0-t2, level L3-L4 is in it twice"),
        (lambda b: edit(b, "L3-L4,", "L3-L4,more,"), "line 2: expected 16 cells"),
        (lambda b: edit(b, "0.0", "x.0"), "could not convert string to float"),
        (lambda b: edit(b, "0.0", "7.0"), "a probability is not from 0 to 1"),
        (lambda b: (b / "results.json").write_text("{"), r"results\.json: damaged"),
        (lambda b: (b / "predictions.csv").write_bytes(b"\xff\xfe\x00"), "not a CSV table in UTF-8"),
        (lambda b: (b / "predictions.csv").write_text("patient,scan,level\n"), "has no column of a task's grades"),
    ],
)
def test_what_is_damaged_is_named(pair, tmp_path, damage, fault):
    damage(pair[1])
    with pytest.raises(SpinejaxError, match=fault):
        compare(*pair[:2], out=tmp_path / "out")


def test_different_labels_of_a_disc_are_refused(pair, tmp_path):
    line = pair[3][0]
    other = "absent" if line["modic_label"] == "present" else "present"
    edit(pair[1], f",{line['modic_label']},{line['modic_grade']},", f",{other},{line['modic_grade']},")
    with pytest.raises(SpinejaxError, match=r"scan p0-t2, level L3-L4: the label of modic is"):
        compare(*pair[:2], out=tmp_path / "out")


def test_options_of_grading_are_refused(pair):
    with pytest.raises(SpinejaxError, match="--compare reads what two evaluations wrote"):
        compare(*pair[:2], data=pair[0])


def test_the_page_has_no_path_and_its_policy_allows_no_request(pair, tmp_path):
    compare(*pair[:2], report=tmp_path / "page")
    text = (tmp_path / "page" / "index.html").read_text()
    assert str(tmp_path) not in text
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text).group(1)
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy
    assert "https://" not in text


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    yield from chromium_driver(tmp_path_factory.mktemp("chromium"))


@pytest.fixture
def page(chromium, pair, tmp_path):
    compare(*pair[:2], report=tmp_path / "page")
    return Page(chromium, (tmp_path / "page" / "index.html").as_uri())


def listed(page):
    rows = page.driver.find_elements("css selector", "#changed tbody tr")
    return [[cell.text for cell in row.find_elements("css selector", "th, td")] for row in rows]


@pytest.mark.browser
def test_the_changes_are_listed_filtered_and_saved(page, pair, tmp_path):
    changed = json.loads((tmp_path / "page" / "comparison.json").read_text())["changed"]
    assert page.console() == []
    assert page.requests() == {(tmp_path / "page" / "index.html").as_uri()}
    assert len(listed(page)) == len(changed)
    page.choose("task", "1")
    modic = [each for each in changed if each["task"] == "modic"]
    assert len(listed(page)) == len(modic)
    page.choose("right", "b")
    better = [each for each in modic if each["b"] == each["label"]]
    assert 0 < len(listed(page)) == len(better)
    assert all("✓" not in row[3] for row in listed(page))
    page.choose("right", "")
    page.find("search").send_keys("p3-t2 l4")
    wanted = [each for each in modic if each["scan"] == "p3-t2" and each["level"] == "L4-L5"]
    assert len(listed(page)) == len(wanted)
    page.choose("task", "")
    page.run("element('search').value = ''; show(chosen());")
    saved = list(csv.DictReader(page.run("return asCsv()").splitlines()))
    assert [(row["scan"], row["level"], row["task"], row["a"], row["b"]) for row in saved] == [
        (each["scan"], each["level"], each["task"], each["a"], each["b"]) for each in changed
    ]
    page.run("window.kept = []; URL.createObjectURL = (blob) => { kept.push(blob.size); return '#'; };")
    page.find("save").click()
    assert page.run("return kept") == [len(page.run("return asCsv()").encode())]


@pytest.mark.browser
def test_many_changes_are_shown_a_hundred_at_a_time(chromium, tmp_path):
    discs = [(f"p{n}", f"p{n}-t2", level) for n in range(70) for level in LEVELS]
    for name, seed in (("a", 1), ("b", 2)):
        evaluation(tmp_path / name, seed=seed, discs=discs)
    compare(tmp_path / "a", tmp_path / "b", out=tmp_path / "out")
    changed = json.loads((tmp_path / "out" / "comparison.json").read_text())["changed"]
    page = Page(chromium, (tmp_path / "out" / "index.html").as_uri())
    seen = listed(page)
    assert len(seen) == 100
    assert not page.find("changed-earlier").is_enabled()
    while page.find("changed-later").is_enabled():
        page.find("changed-later").click()
        seen += listed(page)
    assert len(seen) == len(changed) > 200


@pytest.mark.browser
def test_hostile_words_stay_text(chromium, tmp_path):
    evil = "</script><b id=hit>x"
    for name, seed in (("a", 1), ("b", 2)):
        discs = [(f'"><img src=x>{n}', f"{evil}{n}", f"<i>L{n}</i>") for n in range(9)]
        evaluation(tmp_path / name, seed=seed, discs=discs, tasks={"side": (evil, "=1+1")})
        about = json.loads((tmp_path / name / "results.json").read_text())
        about["network"] = {"name": evil, "weights": evil}
        (tmp_path / name / "results.json").write_text(json.dumps(about))
    compare(tmp_path / "a", tmp_path / "b", out=tmp_path / "out")
    page = Page(chromium, (tmp_path / "out" / "index.html").as_uri())
    page.find("pseudonyms").click()
    assert page.run('return document.getElementById("hit") || document.querySelector("img, tbody i")') is None
    assert page.console() == []
    rows = listed(page)
    assert rows[0][0].startswith(evil)
    assert rows[0][1].startswith("<i>L")
    assert "'=1+1" in page.run("return asCsv()")


@pytest.mark.browser
@needs_axe
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1366, 390])
def test_axe_finds_no_fault_and_it_fits(chromium, pair, tmp_path, width, theme):
    compare(*pair[:2], out=tmp_path / "out")
    page = Page(chromium, (tmp_path / "out" / "index.html").as_uri(), width=width, theme=theme)
    assert page.run("return document.documentElement.scrollWidth") <= width
    assert violations(page) == []
