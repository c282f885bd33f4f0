"""Several scans of one patient, side by side in headless Chromium: what lies where, and which grades changed."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from spinejax.data.dataset import DataSet
from spinejax.geometry import WINDOW_SHAPE
from spinejax.inference.graded import Graded
from spinejax.report.page import Report
from spinejax.report.results import RESEARCH_ONLY
from spinejax.tasks import Task
from tests import browser
from tests.block_spine import block_spine
from tests.browser import chromium_driver
from tests.report.axe import needs_axe, violations
from tests.report.spine_set import SPINE, write_spines
from tests.report.test_page import made_up

pytestmark = pytest.mark.browser

# The second examination has other pixels and slices, and another posture.
LATER = block_spine(spacing_mm=(0.8, 0.9, 5.0), angles_deg=(-5.0, 3.0), tilt_deg=4.0, num_slices=11)
SCANS = [("p0", "p0-b"), ("p0", "p0-a"), ("p1", "p1-t2")]
KNOWN = [{"examination": 2, "days": 403}, {"examination": 1, "days": 0}, {}]
LEVELS = ["L2-L3", "L3-L4", "L4-L5", "L5-S1"]
# Grades of the first task by level, first in the earlier scan, then in the later one.
EARLIER, AFTER = [0, 1, 2, 1], [0, 2, 1, 1]


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    yield from chromium_driver(tmp_path_factory.mktemp("chromium"))


def graded_spines(folder, **options):
    """Discs of three scans, of which two are one patient's, with grades of our choice and a spot in each hotspot."""
    data = DataSet(write_spines(folder, scans=SCANS, spines=(LATER, SPINE, SPINE), **{"known": KNOWN} | options))
    graded, findings = made_up(data, options.get("tasks", data.tasks))
    first = np.full((len(graded.rows), 3), 0.05)
    for place, row in enumerate(graded.rows):
        grades = AFTER if data.scan[row] == "p0-b" else EARLIER
        first[place, grades[LEVELS.index(data.level[row])]] = 0.9
    if "tasks" not in options:
        second = np.tile([0.8, 0.2], (len(first), 1))
        second[(data.scan[graded.rows] == "p0-b") & (data.level[graded.rows] == "L4-L5")] = [0.45, 0.55]
        probabilities = {"brightness": first, "side": second}
        graded = Graded(data, graded.rows, graded.tasks, graded.labels, probabilities, graded.spread)
    return graded, findings


def write(folder, graded, findings):
    report = Report(folder, graded, np.zeros((len(graded.rows), len(graded.tasks)), int))
    maps = np.zeros((len(graded.tasks), *WINDOW_SHAPE), np.float32)
    maps[:, 52:61, 107:117, 4] = 1  # in the middle of the window
    for row in graded.rows:
        report.add(row, maps)
    return report.close(findings).as_uri()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    return write(tmp_path_factory.mktemp("report"), *graded_spines(tmp_path_factory.mktemp("spines") / "set"))


class Page(browser.Page):
    """The follow-up."""

    def settle(self):
        self.wait_until(
            """document.getElementById("follow").scrollIntoView();
            const maps = document.getElementById("follow-overlay").checked ? "maps" : "plain";
            return document.getElementById("follow").hidden || document.body.dataset.follow ===
            `${follow.scans.join()} ${follow.level} ${state.task} ${follow.mm} ${maps}`"""
        )

    def pictures(self):
        self.settle()
        script = 'return [...document.querySelectorAll("#follow-planes canvas")].map((c) => c.toDataURL("image/png"))'
        images = [Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))) for url in self.run(script)]
        return [np.asarray(image.convert("RGB")).astype(float) for image in images]

    def captions(self):
        return [each.text for each in self.driver.find_elements("css selector", "#follow-planes figcaption")]

    def changes(self):
        rows = self.driver.find_elements("css selector", "#follow-changes tbody tr")
        return [[cell.text for cell in row.find_elements("css selector", "th, td")] for row in rows]

    def slide(self, by):
        self.run(
            f"const s = element('follow-slice'); s.value = {by}; s.dispatchEvent(new Event('input', {{bubbles: true}}))"
        )
        self.settle()


@pytest.fixture
def page(chromium, address):
    return Page(chromium, address)


def test_the_scans_of_a_patient_are_side_by_side_in_the_order_of_time(page):
    assert page.captions() == ["Scan 1, first examination, T2", "Scan 2, 403 days later, T2"]
    assert page.run("return follow.scans.map((scan) => facts.scans[scan].id)") == ["p0-a", "p0-b"]
    assert "in the order of their dates" in page.find("follow-order").text
    first, second = page.driver.find_elements("css selector", "#follow-planes canvas")
    assert first.rect["y"] == second.rect["y"]
    assert first.rect["x"] + first.rect["width"] <= second.rect["x"]
    assert first.rect["height"] == second.rect["height"]
    page.choose("spine-scan", "2")  # of a patient with this one scan
    assert not page.find("follow").is_displayed()
    assert page.console() == []


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_is_at_one_height_in_all_scans(page, level):
    """Found by the hotspot's spot in the middle of the disc, in pictures of two geometries."""
    page.choose("follow-level", level)
    with_maps = page.pictures()
    page.press("follow-overlay", " ")
    plain = page.pictures()
    page.press("follow-overlay", " ")
    expected = page.run(
        """const frame = frameOf(follow.scans), canvas = document.querySelector("#follow-planes canvas");
        return [canvas.height * frame.above / (frame.above + frame.below), canvas.width / 2]"""
    )
    for one, other in zip(with_maps, plain, strict=True):
        found = np.argwhere(np.abs(one - other).sum(2) > 60)
        spot = found[np.linalg.norm(found - expected, axis=1) < 15]
        assert len(spot) > 20
        np.testing.assert_allclose(spot.mean(0), expected, atol=2.5)


def test_all_scans_have_one_scale(page):
    """The discs are 35 mm apart along both spines, whatever their pixels."""
    gaps = page.run(
        """return follow.scans.map((scan) => facts.scans[scan].discs.map((index) => placeMm(scan, index)))
        .map((places) => places.slice(1).map(([x, y], i) => Math.hypot(x - places[i][0], y - places[i][1])))"""
    )
    np.testing.assert_allclose(gaps, 35, atol=1.5)
    first, second = page.pictures()
    assert first.shape == second.shape


def test_the_slices_of_all_scans_are_equally_far_from_the_middle(page):
    page.press("follow-overlay", " ")
    before = page.pictures()
    assert page.run("return follow.scans.map(planeOf)") == [6, 5]
    page.slide(4)  # 16 mm, of slices that are 4 and 5 mm apart
    assert page.run("return follow.scans.map(planeOf)") == [10, 8]
    assert page.find("follow-where").text == "16 mm to the left"
    assert all(after.mean() > earlier.mean() for after, earlier in zip(page.pictures(), before, strict=True))
    assert page.run("return facts.scans[state.scan].id") == "p0-a"
    assert page.run("return state.plane") == 10  # the spine above follows
    page.run("choosePlane(3)")  # and is followed
    page.settle()
    assert page.find("follow-where").text == "12 mm to the right"
    assert page.run("return follow.scans.map(planeOf)") == [3, 3]
    page.run("follow.mm = 60; drawFollow()")  # beyond both scans: boxes alone
    assert page.run("return follow.scans.map(planeOf)") == [None, None]
    assert all(after.mean() < earlier.mean() / 2 for after, earlier in zip(page.pictures(), before, strict=True))


def test_changes_of_grade_are_marked(page):
    names = page.run("return facts.tasks[0].grades")
    for line, level, before, after in zip(page.changes(), LEVELS, EARLIER, AFTER, strict=True):
        if before == after:
            assert line[:2] == [level, names[before]]
        else:
            assert line[:2] == [level, f"{names[before]} → {names[after]} {'▲' if after > before else '▼'}"]
    sides = page.run("return facts.tasks[1].grades")
    assert [line[2] for line in page.changes()] == [
        f"{sides[0]} → {sides[1]} ▲ ?" if level == "L4-L5" else sides[0] for level in LEVELS
    ]
    marked = page.driver.find_elements("css selector", "#follow-changes td.changed")
    assert len(marked) == 3


def test_levels_are_chosen_on_the_pictures_in_the_table_and_above(page):
    page.run("chooseDisc(0)")
    assert page.run("return follow.level") == "L2-L3"
    page.driver.find_elements("css selector", "#follow-changes tbody button")[2].click()
    page.settle()
    assert (page.run("return follow.level"), page.find("disc-name").text[:5]) == ("L4-L5", "L4-L5")
    page.run(
        """const canvas = document.querySelectorAll("#follow-planes canvas")[0];
        const [, y] = placeMm(follow.scans[0], facts.scans[follow.scans[0]].discs[3]), frame = frameOf(follow.scans);
        const offset = y - placeMm(follow.scans[0], anchorOf(follow.scans[0]))[1] + frame.above;
        const box = canvas.getBoundingClientRect(), at = box.top + box.height * offset / (frame.above + frame.below);
        canvas.dispatchEvent(new MouseEvent("click", {clientX: box.left + 20, clientY: at, bubbles: true}));"""
    )
    page.settle()
    assert page.run("return follow.level") == "L5-S1"
    page.choose("follow-task", "1")
    assert page.run("return state.task") == 1


def test_the_other_scans_are_drawn_when_they_are_looked_at(page):
    page.run("scrollTo(0, document.documentElement.scrollHeight)")
    page.wait_until("return !follow.near")
    page.run("chooseDisc(2)")
    before = page.run("return document.body.dataset.follow")
    page.wait_until("return document.body.dataset.drawn.startsWith('2 ')")
    assert page.run("return document.body.dataset.follow") == before
    page.settle()  # scrolls there
    assert page.run("return document.body.dataset.follow") != before


def test_changes_are_copied_as_text(page):
    page.run(
        """window.copied = "";
        navigator.clipboard.writeText = (text) => { window.copied = text; return Promise.resolve(); };"""
    )
    page.find("follow-copy").click()
    page.wait_until("return copied")
    head, *lines, end = page.run("return copied").strip().split("\n")
    assert head.startswith("Follow-up of patient p0: Scan 1, first examination, T2 (p0-a); Scan 2, 403 days later")
    assert lines[0] == "L2-L3: no change."
    assert "Side" in lines[2]
    assert "(a close call)" in lines[2]
    assert end == RESEARCH_ONLY
    assert page.find("follow-copied").text == "Changes copied."


def test_without_pictures_and_dates_the_changes_are_told_all_the_same(chromium, tmp_path):
    known = [{"examination": 2, "days": None}, {"examination": 1, "days": None}]
    page = Page(chromium, write(tmp_path / "out", *graded_spines(tmp_path / "set", known=known, pictured=[])))
    assert all("not with this data set" in caption for caption in page.captions())
    assert "whose dates are not known" in page.find("follow-order").text
    assert len(page.driver.find_elements("css selector", "#follow-changes td.changed")) == 3
    assert page.console() == []


def test_hostile_words_stay_text(chromium, tmp_path):
    evil = Task("side", ("</script><b id=hit>x", '"><img src=x>'))
    page = Page(chromium, write(tmp_path / "out", *graded_spines(tmp_path / "set", tasks=(evil,))))
    assert page.run('return document.getElementById("hit") || document.querySelector("img")') is None
    assert {word for row in page.changes() for word in evil.grades if word in row[1]}
    assert page.console() == []


@needs_axe
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1366, 390])
def test_axe_finds_no_fault_and_it_fits(chromium, address, width, theme):
    page = Page(chromium, address, width=width, theme=theme)
    assert page.run("return document.documentElement.scrollWidth") <= width
    assert violations(page) == []
