"""The report's pages as text: what is in them, what must not be, how large they grow. `test_browser.py` opens them."""

import base64
import dataclasses
import hashlib
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from spinejax.data.dataset import DataSet
from spinejax.data.manifest import write_manifest
from spinejax.data.shards import shard_name, write_shard
from spinejax.errors import SpinejaxError
from spinejax.geometry import WINDOW_SHAPE, central_window
from spinejax.inference.graded import Graded, labels_of
from spinejax.report.page import DISCS_PER_PAGE, MAP_BYTES, WINDOW_BYTES, Report, _by_scan, map_sheet, window_sheet
from spinejax.report.results import Findings
from spinejax.tasks import PAPER_TASKS, Task
from tests.conftest import TASKS, a_disc, write_tiny

PLANTED = "Mueller_Hans_1961"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """In a folder whose name must appear nowhere."""
    return DataSet(write_tiny(tmp_path_factory.mktemp("data") / PLANTED, num_patients=(1, 1, 3), num_shards=1))


def made_up(data, tasks=TASKS, seed=0):
    """Test discs with random grades, and findings about them."""
    rng = np.random.default_rng(seed)
    rows = data.rows("test")
    labels = labels_of(data, rows, tasks)
    probabilities = {task.name: rng.dirichlet(np.ones(task.num_grades), len(rows)) for task in tasks}
    spread = {task.name: rng.uniform(0, 0.1, len(rows)) for task in tasks}
    graded = Graded(data, rows, tasks, labels, probabilities, spread)
    about = {"split": "test", "num_views": 54, "average": "probabilities", "step": 7, "data": data.digest}
    about |= {"trained_on_this_data": False, "validation_split": "validation", "split_chose_the_step": False}
    return graded, Findings(about, "conv5", graded.results(), graded.doubts())


def a_map(place, num_tasks):
    """A blob a task, each at its own place."""
    maps = np.zeros((num_tasks, *WINDOW_SHAPE), np.float32)
    for task in range(num_tasks):
        maps[task, 20 + 10 * task : 40 + 10 * task, 30 + 5 * place : 80 + 5 * place, 2:7] = 1 + task
    return maps


def write(folder, data, *, hotspots=True, discs_per_page=None, tasks=TASKS):
    graded, findings = made_up(data, tasks)
    traced = np.stack([graded.probabilities[task.name].argmax(1) for task in tasks], axis=1)
    page = Report(folder, graded, traced if hotspots else None, discs_per_page=discs_per_page)
    for place, row in enumerate(graded.rows):
        page.add(row, a_map(place, len(tasks)) if hotspots else None)
    return page.close(findings), graded


def embedded(text, name):
    """The text of the script element of that id."""
    return re.search(rf'<script type="[^"]+" id="{name}">(.*?)</script>', text, re.S).group(1).strip()


def picture(text, name):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(embedded(text, name)))).convert("L"))


def test_the_page_has_the_metrics_and_every_disc(data, tmp_path):
    path, graded = write(tmp_path, data)
    text = path.read_text()
    for words in ("Summary", "Agreement with the rater", "Confidence", "Research use only", "not proven pathology"):
        assert words in text
    facts = json.loads(embedded(text, "facts"))
    assert [task["grades"] for task in facts["tasks"]] == [list(task.grades) for task in TASKS]
    assert len(facts["discs"]) == len(graded.rows) == 9
    for place, disc in enumerate(facts["discs"]):
        row = graded.rows[place]
        assert (disc["scan"], disc["level"], disc["slices"]) == (data.scan[row], data.level[row], [0, 9])
        assert disc["label"] == data.labels[row].tolist()
        assert disc["grade"] == [graded.probabilities[task.name][place].argmax() for task in TASKS]
        np.testing.assert_allclose(disc["p"][1], graded.probabilities["side"][place], atol=1e-4)
        assert disc["pixelMm"] == 0.3
    estimate = graded.results()[0].estimates["mean_per_class_accuracy"]
    assert f"{100 * estimate.value:.1f} [" in text


def test_the_page_shows_the_grades_that_were_decided(data, tmp_path):
    graded, findings = made_up(data)
    unsure = np.tile([0.4, 0.3, 0.3], (len(graded.rows), 1))
    probabilities = {**graded.probabilities, "brightness": unsure}
    by_distance = dataclasses.replace(graded, probabilities=probabilities, decide_by="distance")
    facts = json.loads(embedded(Report(tmp_path, by_distance, None).close(findings).read_text(), "facts"))
    assert {disc["grade"][0] for disc in facts["discs"]} == {1}


def test_slices_are_neither_upside_down_nor_mirrored(data, tmp_path):
    path, graded = write(tmp_path, data)
    sheet = picture(path.read_text(), "window-4").astype(float)
    window = central_window(data.volume(graded.rows[4]))
    for s in (0, 3, 8):
        np.testing.assert_allclose(sheet[s * 112 : (s + 1) * 112] / 255, window[:, :, s] / 65535, atol=0.12)
    maps = picture(path.read_text(), "maps-4").astype(float)
    expected = a_map(4, 2)[1, ::2, ::2, 5] / 2  # each map by its own brightest
    np.testing.assert_allclose(maps[56:, 5 * 112 : 6 * 112] / 255, expected, atol=0.25)
    assert np.abs(maps[56:, 5 * 112 : 6 * 112] / 255 - expected).mean() < 0.02
    assert maps[56:, :112].max() < 40  # nothing in the first slice


def test_the_policy_allows_the_one_script_and_style_and_no_request(data, tmp_path):
    text = write(tmp_path, data)[0].read_text()
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', text).group(1)
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    for element, rule in (("style", "style-src"), ("script", "script-src")):
        [content] = re.findall(rf"<{element}>(.*?)</{element}>", text, re.S)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert rules[rule] == f"'sha256-{digest}'"
    assert "unsafe" not in policy
    markup = re.sub(r"<(script|style)\b.*?</\1>", "", text, flags=re.S)
    assert not re.search(r"\son\w+=|\sstyle=|javascript:", markup)
    assert not re.search(r"""(?:src|href|action)=["'](?!#)""", markup)
    assert "http://" not in text.replace("http-equiv", "")
    assert "https://" not in text


def test_the_page_has_no_name_and_no_path_of_a_source(data, tmp_path):
    folder = tmp_path / f"{PLANTED}-report"
    write(folder, data, discs_per_page=3)
    for path in folder.iterdir():
        text = path.read_text()
        assert PLANTED not in text
        assert str(tmp_path) not in text
        assert str(data.folder.parent) not in text


def test_words_of_a_task_table_are_escaped(tmp_path):
    odd = (Task("side", ("</script><b>x", 'b"<i>')), Task("other", ("a&b", "c")))
    rng = np.random.default_rng(0)
    disc = a_disc(rng, "p0", "L5-S1", "test", labels={"side": 0, "other": 1})
    write_manifest(tmp_path, [write_shard(tmp_path / shard_name(0, 1), [disc], odd)], odd, {}, ())
    text = write(tmp_path / "out", DataSet(tmp_path), tasks=odd)[0].read_text()
    assert "<b>x" not in text
    assert "<i>" not in text
    assert json.loads(embedded(text, "facts"))["tasks"][0]["grades"] == list(odd[0].grades)


def chunk(path):
    """Identity, number and pictures of a chunk, which is a script that hands over JSON."""
    identity, number, pictures = re.fullmatch(r'keepChunk\("(\w+)",(\d+),(.*)\);\n', path.read_text(), re.S).groups()
    return identity, int(number), json.loads(pictures)


def test_pictures_of_a_large_set_are_in_chunks_beside_the_page_and_a_scans_stay_together(data, tmp_path):
    (tmp_path / "discs-009.html").write_text("of an earlier report")
    (tmp_path / "discs-0009.js").write_text("of an earlier report")
    path, graded = write(tmp_path, data, discs_per_page=4)  # scans of 3 discs: one a chunk
    names = [f"discs-000{number}.js" for number in (1, 2, 3)]
    assert sorted(page.name for page in tmp_path.iterdir()) == [*names, "index.html"]
    text = path.read_text()
    facts = json.loads(embedded(text, "facts"))
    assert [disc["chunk"] for disc in facts["discs"]] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [disc["level"] for disc in facts["discs"]] == data.level[graded.rows].tolist()
    assert 'id="window-0"' not in text
    found = {}
    for number, name in enumerate(names):
        identity, told, pictures = chunk(tmp_path / name)
        assert (identity, told) == (facts["identity"], number)
        assert {disc["scan"] for disc in facts["discs"] if f"window-{facts['discs'].index(disc)}" in pictures}
        found |= pictures
    whole = write(tmp_path / "whole", data)[0].read_text()
    assert found == {f"{kind}-{n}": embedded(whole, f"{kind}-{n}") for kind in ("window", "maps") for n in range(9)}


def test_the_policy_of_a_large_set_lets_the_pages_own_script_load_and_no_other(data, tmp_path):
    policies = [
        re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', path.read_text()).group(1)
        for path in (write(tmp_path / "many", data, discs_per_page=3)[0], write(tmp_path / "few", data)[0])
    ]
    assert policies[0].replace(" 'strict-dynamic'", "") == policies[1]
    assert "default-src 'none'" in policies[0]


def test_chunks_of_other_grades_have_another_identity(data, tmp_path):
    write(tmp_path, data, discs_per_page=3)
    before = chunk(tmp_path / "discs-0001.js")[0]
    graded, findings = made_up(data, seed=1)
    Report(tmp_path, graded, discs_per_page=3).close(findings)
    assert chunk(tmp_path / "discs-0001.js")[0] != before


@pytest.mark.parametrize(
    ("scans", "limit", "expected"),
    [
        ("aabbcc", 4, [(0, 4), (4, 6)]),
        ("aaaaab", 2, [(0, 5), (5, 6)]),  # a scan is never parted, even if it is too long
        ("abc", 300, [(0, 3)]),
        ("abcabc", 1, [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 6)]),
    ],
)
def test_pages_are_stretches_of_whole_scans(scans, limit, expected):
    pages = _by_scan(np.array(list(scans)), limit)
    assert [(page.start, page.stop) for page in pages] == expected


def test_without_hotspots_or_labels_there_is_still_a_page(tmp_path):
    rng = np.random.default_rng(0)
    discs = [a_disc(rng, f"p{n}", "L5-S1", "test", labels={}) for n in range(2)]
    write_manifest(tmp_path, [write_shard(tmp_path / shard_name(0, 1), discs, TASKS)], TASKS, {}, ())
    text = write(tmp_path / "out", DataSet(tmp_path), hotspots=False)[0].read_text()
    assert "there are grades, but no metrics" in text
    assert 'id="maps-0"' not in text
    assert 'id="overlay"' not in text
    assert 'id="window-1"' in text
    assert json.loads(embedded(text, "facts"))["discs"][0]["label"] == [-1, -1]


@pytest.mark.parametrize("grain", [1, 2, 8])
def test_300_discs_with_six_maps_stay_below_25_megabytes(grain):
    """Noise is the most that a disc can ask for: it is packed more coarsely, and keeps to the budget."""
    rng = np.random.default_rng(0)
    window = rng.normal(30000, 3000, WINDOW_SHAPE).clip(0, 65535).astype(np.uint16)
    coarse = rng.exponential(1, (6, 112 // grain, 224 // grain, 9)).astype(np.float32)
    coarse = coarse.repeat(grain, axis=1).repeat(grain, axis=2)
    sheets = len(window_sheet(window)), len(map_sheet(coarse))
    assert sheets[0] <= WINDOW_BYTES
    assert sheets[1] <= 6 * MAP_BYTES
    facts_bytes = 1_000
    assert DISCS_PER_PAGE * (WINDOW_BYTES + 6 * MAP_BYTES + facts_bytes) < 25e6


def test_an_empty_map_is_dark():
    sheet = map_sheet(np.zeros((2, *WINDOW_SHAPE), np.float32))
    assert np.asarray(Image.open(io.BytesIO(base64.b64decode(sheet))).convert("L")).max() < 3


def test_discs_in_another_order_are_a_programming_error(data, tmp_path):
    graded, _ = made_up(data)
    page = Report(tmp_path, graded)
    with pytest.raises(ValueError, match="is not the next disc"):
        page.add(graded.rows[1])


def test_a_folder_that_cannot_be_made_is_named(data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SpinejaxError, match=r"--report .*file/out: no folder can be made there"):
        Report(tmp_path / "file" / "out", made_up(data)[0])


def test_the_papers_tasks_are_compared_with_its_table_2(tmp_path):
    rng = np.random.default_rng(0)
    labels = [{task.name: n % task.num_grades for task in PAPER_TASKS} for n in range(6)]
    discs = [a_disc(rng, f"p{n}", "L5-S1", "test", labels=each) for n, each in enumerate(labels)]
    write_manifest(tmp_path, [write_shard(tmp_path / shard_name(0, 1), discs, PAPER_TASKS)], PAPER_TASKS, {}, ())
    text = write(tmp_path / "out", DataSet(tmp_path), tasks=PAPER_TASKS)[0].read_text()
    for words in ("Paper, conv5 branch", "73.9 ± 0.7", "cannot be compared directly"):
        assert words in text
