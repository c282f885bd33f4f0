"""The view of a spine in headless Chromium: what lies where, what a click and a key do, what is copied and printed."""

import base64
import csv
import dataclasses
import io
import re

import numpy as np
import pytest
from PIL import Image

from data_prep.anatomy.discs import window_in_scan
from spinejax.data.dataset import DataSet
from spinejax.geometry import WINDOW_SHAPE, window_affine
from spinejax.report.page import Report
from spinejax.tasks import Task
from tests import browser
from tests.browser import chromium_driver
from tests.report.axe import needs_axe, violations
from tests.report.spine_set import SPINE, write_spines
from tests.report.test_page import made_up, write

pytestmark = pytest.mark.browser

LEFT, RIGHT, UP, DOWN, ENTER, SPACE = "\ue012\ue014\ue013\ue015\ue007 "
SCANS = [("p0", "p0-t1"), ("p0", "p0-t2"), ("p1", "p1-t2")]
LESION = (60, 150, 4)  # row, column and slice of the window


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    yield from chromium_driver(tmp_path_factory.mktemp("chromium"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return DataSet(write_spines(tmp_path_factory.mktemp("spines") / "set", scans=SCANS, pictured=["p0-t1", "p1-t2"]))


def lesion_map(num_tasks):
    """A spot in the middle slot, of the first task alone."""
    maps = np.zeros((num_tasks, *WINDOW_SHAPE), np.float32)
    row, column, slot = LESION
    maps[0, row - 4 : row + 5, column - 4 : column + 5, slot] = 1
    return maps


@pytest.fixture(scope="module")
def address(data, tmp_path_factory):
    graded, findings = made_up(data)
    report = Report(tmp_path_factory.mktemp("report"), graded, np.zeros((len(graded.rows), 2), int))
    for row in graded.rows:
        report.add(row, lesion_map(2))
    return report.close(findings).as_uri()


class Page(browser.Page):
    """The spine's view."""

    def settle(self):
        self.wait_until(
            """const overlay = document.getElementById("spine-overlay");
            const map = !facts.scans[state.scan].picture ? "none" : `${state.plane} ` + (
                overlay && overlay.checked ? document.getElementById("spine-opacity").value : "plain");
            return document.body.dataset.spine === `${state.scan} ${state.task} ${map}`"""
        )

    def picture(self):
        """The canvas' pixels."""
        self.settle()
        url = self.run('return document.getElementById("plane-picture").toDataURL("image/png")')
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).convert("RGB")).astype(float)

    def state(self, name):
        return self.run(f"return state.{name}")

    def table(self):
        rows = self.driver.find_elements("css selector", "#levels tbody tr")
        return [[cell.text for cell in row.find_elements("css selector", "th, td")] for row in rows]

    def printed_pages(self):
        printed = self.driver.execute_cdp_cmd("Page.printToPDF", {"preferCSSPageSize": True, "printBackground": True})
        return len(re.findall(rb"/Type\s*/Page\b", base64.b64decode(printed["data"])))


@pytest.fixture
def page(chromium, address):
    return Page(chromium, address)


def canvas_place(page, point_mm):
    """(row, column) of the canvas, and the slice, of a point of the patient."""
    row, column, place = (np.linalg.inv(SPINE.scan.affine) @ [*point_mm, 1])[:3]
    rows, columns = SPINE.scan.voxels.shape[:2]
    height, width = page.picture().shape[:2]
    return (row + 0.5) * height / rows - 0.5, (column + 0.5) * width / columns - 0.5, place


def test_the_scan_is_shown_in_its_true_proportions_and_by_its_slices(page):
    rows_mm, columns_mm = SPINE.scan.spacing_mm[:2] * SPINE.scan.voxels.shape[:2]
    box = page.find("plane").rect
    assert box["width"] / box["height"] == pytest.approx(columns_mm / rows_mm, rel=0.01)
    height, width = page.picture().shape[:2]
    assert width / height == pytest.approx(columns_mm / rows_mm, rel=0.01)
    assert page.state("plane") == 6
    page.press("spine-overlay", SPACE)
    before = page.picture()
    page.press("plane", RIGHT, RIGHT)
    assert "slice 9 of 13, 8 mm to the left" in page.find("plane-where").text
    assert page.picture().mean() > before.mean()  # each slice of a block spine is brighter than the one before
    page.press("plane", *[LEFT] * 20)
    assert page.state("plane") == 0
    assert "to the right" in page.find("plane-where").text


def test_every_hotspot_lies_where_its_evidence_is_in_the_patient(page, data):
    """All discs at once: each spot's middle, found by its colour, against the discs' own affines."""
    with_maps = page.picture()
    page.press("spine-overlay", SPACE)
    plain = page.picture()
    changed = np.abs(with_maps - plain).sum(2) > 60
    expected = []
    for row in np.flatnonzero(data.scan == "p0-t1"):
        *place, number = canvas_place(page, (window_affine(data.affine[row]) @ [*LESION, 1])[:3])
        assert round(number) == 6
        expected.append(place)
    found = np.argwhere(changed)
    nearest = np.array([np.linalg.norm(found - place, axis=1) for place in expected])
    assert nearest.min(0).max() < 12  # nothing is painted elsewhere
    for place, distances in zip(expected, nearest, strict=True):
        spot = found[distances < 12]
        assert np.linalg.norm(spot.mean(0) - place) < 1
    page.press("spine-overlay", SPACE)
    page.choose("spine-task", "1")
    np.testing.assert_array_equal(page.picture(), plain)  # this task has no evidence
    page.choose("spine-task", "0")
    page.press("plane", RIGHT)
    assert np.ptp(page.picture(), axis=2).max() < 8  # nor has the next slice


def test_the_opacity_of_the_hotspots(page):
    strong = page.picture()
    page.run('const o = document.getElementById("spine-opacity"); o.value = 20; o.dispatchEvent(new Event("input"))')
    faint = page.picture()
    page.press("plane", "o")
    assert not page.run('return document.getElementById("spine-overlay").checked')
    plain = page.picture()
    assert 0 < np.abs(faint - plain).mean() < 0.6 * np.abs(strong - plain).mean()


def test_each_disc_has_a_box_at_its_place_and_its_level_and_grade_beside(page, data):
    graded, _ = made_up(data)
    rows = np.flatnonzero(data.scan == "p0-t1")
    outlines = page.run(
        'return [...document.querySelectorAll("#plane-lines .box")].map((e) => e.getAttribute("points"))'
    )
    tags = page.driver.find_elements("css selector", "#plane-levels button")
    levels = [tag.text.split()[0] for tag in tags]
    assert levels == ["L2-L3", "L3-L4", "L4-L5", "L5-S1"] == data.level[rows].tolist()
    for row, points, tag in zip(rows, outlines, tags, strict=True):
        corners = np.array([[float(each) for each in point.split(",")] for point in points.split()])
        window = window_in_scan(SPINE.scan, data.affine[row])[:, ::-1]
        np.testing.assert_allclose(corners.mean(0), window.mean(0), atol=0.6)
        ours, theirs = corners[1] - corners[0], window[1] - window[0]
        np.testing.assert_allclose(ours / np.linalg.norm(ours), theirs / np.linalg.norm(theirs), atol=0.01)
        assert tag.text.split()[1] == graded.tasks[0].grades[graded.probabilities["brightness"][row].argmax()]
    assert len(page.driver.find_elements("css selector", "#plane-lines .body")) == 5


def test_a_click_or_a_key_on_a_disc_opens_it_in_the_disc_browser(page):
    page.driver.find_elements("css selector", "#plane-levels button")[2].click()
    assert (page.state("disc"), page.find("disc-name").text[:5]) == (2, "L4-L5")
    assert page.run("return document.activeElement.id") == "picture"
    assert page.run('return document.getElementById("discs").getBoundingClientRect().top') < 60
    page.press("plane", UP, ENTER)
    assert page.state("disc") == 1
    page.press("plane", DOWN, DOWN, DOWN, DOWN)
    assert page.state("disc") == 3
    page.run('document.querySelectorAll("#plane-lines .box")[0].dispatchEvent(new MouseEvent("click"))')
    assert page.state("disc") == 0
    page.driver.find_elements("css selector", "#levels tbody button")[1].send_keys(ENTER)
    assert page.state("disc") == 1


def test_the_table_has_a_row_for_each_level_and_a_column_for_each_task(page, data):
    graded, _ = made_up(data)
    rows = np.flatnonzero(data.scan == "p0-t1")
    for row, (level, *cells) in zip(rows, page.table(), strict=True):
        assert level == data.level[row]
        for task, cell in zip(graded.tasks, cells, strict=True):
            chances = graded.probabilities[task.name][row]
            grade, share = cell.split("\n")[:2]
            assert grade == task.grades[chances.argmax()]
            assert (
                share.split()[0].lstrip(">") == f"{100 * min(chances.max(), 0.99 if chances.max() > 0.995 else 1):.0f}"
            )
            assert ("?" in share) == (np.diff(np.sort(chances))[-1] < 0.2)
            label = graded.labels[task.name][row]
            assert ("rater" in cell) == (label >= 0)
            if label >= 0:
                assert cell.endswith(f"rater {task.grades[label]}")


def test_a_table_that_goes_on_to_the_right_fades_there(chromium, address):
    page = Page(chromium, address, width=200)
    fade = "return parseFloat(getComputedStyle(document.querySelector('.levels .wide')).getPropertyValue('--fade'))"
    assert page.run("const box = document.querySelector('.levels .wide'); return box.scrollWidth > box.clientWidth")
    page.wait_until(f"{fade} > 20")
    page.run("const box = document.querySelector('.levels .wide'); box.scrollLeft = box.scrollWidth")
    page.wait_until(f"{fade} === 0")


def test_scans_have_short_names_and_pseudonyms_on_demand(page):
    options = page.driver.find_elements("css selector", "#spine-scan option")
    assert [option.get_attribute("text") for option in options] == [
        "Patient 1, scan 1",
        "Patient 1, scan 2",
        "Patient 2",
    ]
    assert page.find("spine-name").text == "Patient 1, scan 1"
    assert "p0-t1" not in page.driver.find_element("tag name", "body").text
    page.find("pseudonyms").click()
    assert page.find("spine-id").text == "patient p0, scan p0-t1"


def test_a_scan_that_is_gone_is_shown_by_its_discs_and_that_is_said(page):
    assert not page.find("no-picture").is_displayed()
    page.choose("spine-scan", "1")
    assert "discs only" in page.find("no-picture").text
    assert not page.find("plane").is_displayed()
    assert len(page.table()) == 4
    page.driver.find_elements("css selector", "#levels tbody button")[1].click()
    assert page.find("disc-name").text == "L3-L4Patient 1, scan 2"
    page.choose("spine-scan", "2")
    assert page.find("plane").is_displayed()
    assert page.find("disc-name").text == "L2-L3Patient 2"
    assert page.console() == []


def test_doubtful_levels_and_bodies_are_shown_as_such(chromium, tmp_path):
    data = DataSet(write_spines(tmp_path / "set", unsure="L4"))
    page = Page(chromium, write(tmp_path / "out", data)[0].as_uri())
    assert "may be off by one" in page.find("doubtful-levels").text
    assert len(page.driver.find_elements("css selector", "#plane-lines .body.unsure")) == 1
    assert page.run("return asText(facts.scans[0])").splitlines()[1].startswith("The levels are doubtful")


def copied(page, button):
    """What a button copies: the clipboard of headless Chromium belongs to no page, so its call is watched."""
    page.run("navigator.clipboard.writeText = async (text) => { window.copiedText = text; }")
    page.find(button).click()
    page.wait_until('return document.getElementById("copied").textContent.includes("copied")')
    return page.run("return copiedText")


def test_the_table_is_copied_as_text_and_as_csv(page, data):
    graded, _ = made_up(data)
    lines = copied(page, "copy-text").splitlines()
    assert lines[0] == "Patient 1, scan 1 (p0-t1)"
    assert [line.split(":")[0] for line in lines[1:5]] == ["L2-L3", "L3-L4", "L4-L5", "L5-S1"]
    assert "Research use only" in lines[-1]
    rows = list(csv.DictReader(io.StringIO(copied(page, "copy-csv"))))
    for number, row in enumerate(rows):
        chances = graded.probabilities["brightness"][number]
        assert row["level"] == data.level[number]
        assert row["brightness"] == graded.tasks[0].grades[chances.argmax()]
        assert float(row["brightness_probability"]) == pytest.approx(chances.max(), abs=1e-4)
        assert row["brightness_rater"] == graded.tasks[0].grades[graded.labels["brightness"][number]]
        assert row["side_rater"] == ""
        assert f"{graded.tasks[0].grades[chances.argmax()]} (" in lines[1 + number]


def test_a_grade_that_is_rarer_than_it_is_probable_is_shown_beside_the_more_probable_one(chromium, data, tmp_path):
    graded, findings = made_up(data)
    num = len(graded.rows)
    habits = {"probabilities": {"brightness": [[0.2, 0.1, 0.7]], "side": [[0.8, 0.2]]}}
    habits["frequencies"] = {"brightness": [[0.3, 0.3, 0.4]], "side": [[0.95, 0.05]]}
    habits = {part: {name: np.tile(each, (num, 1)) for name, each in found.items()} for part, found in habits.items()}
    # If all grades were equally frequent: of brightness 0.23, 0.12 and 0.65, of side 0.17 and 0.83.
    report = Report(tmp_path, dataclasses.replace(graded, rater="someone", **habits), None)
    page = Page(chromium, report.close(findings).as_uri())
    line = copied(page, "copy-text").splitlines()[1]
    assert "Brightness bright (70 %" in line
    assert "Side back (20 %; more probable: front, 80 %" in line
    assert [cell.endswith("?") for cell in page.table()[0][1:]] == [False, False], "no close call"
    rare = page.driver.find_elements("css selector", "#levels td.rare .grade")
    assert {cell.text for cell in rare} == {"back"}
    assert len(rare) == len(page.table())
    page.run('document.getElementById("as-table").open = true')
    page.wait_until("return document.querySelector('#table tbody tr')")
    for table, grades in (("#tasks", 1), ("#table", min(50, num))):
        rare = page.driver.find_elements("css selector", f"{table} td.rare .grade")
        assert [cell.get_attribute("textContent") for cell in rare] == ["back"] * grades
    assert "Probabilities are those of someone's raters" in page.driver.find_element("css selector", ".levels").text


def test_hostile_words_stay_text_and_formulas_do_not_run(chromium, tmp_path):
    odd = (Task("side", ("</script><b id=hit>x", '"><img src=x>,\n')), Task("other", ("=1+1", "-2")))
    page = Page(
        chromium, write(tmp_path / "out", DataSet(write_spines(tmp_path / "set", tasks=odd)), tasks=odd)[0].as_uri()
    )
    assert page.run('return document.getElementById("hit") || document.querySelector("img")') is None
    cells = {cell.split("\n")[0] for row in page.table() for cell in row[1:]}
    assert cells <= {"</script><b id=hit>x", '"><img src=x>,', "=1+1", "-2"}
    rows = list(csv.DictReader(io.StringIO(copied(page, "copy-csv"), newline="")))
    assert {row["side"] for row in rows} <= set(odd[0].grades)
    assert {row["other"] for row in rows} <= {"'=1+1", "-2"}
    assert page.console() == []


def test_tab_reaches_every_control_of_the_spine(page):
    page.run("document.activeElement.blur()")
    seen = []
    while "task" not in seen[-1:]:
        page.driver.switch_to.active_element.send_keys("\ue004")
        seen.append(page.run("return document.activeElement.id || document.activeElement.textContent"))
        assert len(seen) < 80
    start = seen.index("follow-level")
    followed = ["follow-level", "follow-task", "follow-overlay", "follow-slice", "follow-copy"]
    assert [name for name in seen[start:] if name in followed] == followed
    assert seen[start:].count("L4-L5") == 1
    seen = seen[:start]
    wanted = [
        "pseudonyms",
        "plane",
        "plane-number",
        "spine-opacity",
        "spine-overlay",
        "lines",
        "spine-scan",
        "spine-task",
    ]
    assert [name for name in seen if name in wanted] == wanted
    assert [name for name in seen if name in ("Brightness", "Side")] == ["Brightness", "Side"]
    assert seen.count("L4-L5") == 1  # in the table
    assert [name for name in seen if name.startswith("L4-L5 ")]  # and on the picture
    assert {"copy-text", "copy-csv", "print", "print-all"} <= set(seen)


@needs_axe
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1366, 390])
def test_axe_finds_no_fault(chromium, address, width, theme):
    """Contrast, names, roles and the like, by the rules of WCAG 2.1 A and AA."""
    assert violations(Page(chromium, address, width=width, theme=theme)) == []


def test_a_scan_is_printed_on_one_page_and_all_scans_on_one_each(chromium, data, tmp_path):
    graded, findings = made_up(data)
    for labels in graded.labels.values():
        labels[:] = -1
    report = Report(tmp_path, graded, np.zeros((len(graded.rows), 2), int))
    for row in graded.rows:
        report.add(row, lesion_map(2))
    page = Page(chromium, report.close(type(findings)(findings.about, "conv5", [])).as_uri())
    assert page.printed_pages() == 1
    page.run("window.print = () => { window.printed = document.getElementById('sheets').cloneNode(true); }")
    page.find("print-all").click()
    page.wait_until("return window.printed && document.getElementById('sheets').childElementCount === 0")
    names = page.run("return [...printed.querySelectorAll('h2')].map((e) => e.textContent)")
    assert names == ["Patient 1, scan 1", "Patient 1, scan 2", "Patient 2"]
    page.run("document.getElementById('sheets').replaceWith(printed)")
    assert page.printed_pages() == 3
    assert page.state("scan") == 0


def test_names_in_the_list_are_whole(page):
    page.run("for (const each of document.querySelectorAll('#list .who')) each.textContent = 'Patient 12, scan 1'")
    widths = "return [...document.querySelectorAll('#list .who')].map((each) => [each.scrollWidth, each.clientWidth])"
    needed, given = np.transpose(page.run(widths))
    assert (needed <= given).all()


def test_of_many_scans_sixty_are_printed_at_once_from_the_chosen_one_on(page):
    page.run("facts.scans.push(...Array(60).fill(facts.scans[0])); chooseScan(1)")
    page.run("window.print = () => { window.printed = document.getElementById('sheets').childElementCount; }")
    page.find("print-all").click()
    page.wait_until("return window.printed")
    assert page.run("return printed") == 60
    assert page.state("scan") == 1


def test_what_is_printed_is_dark_on_white_and_has_all_tasks(chromium, address):
    """Of ten tasks, from a browser that is set to dark, on the 184 mm of an A4 page between its margins."""
    page = Page(chromium, address, width=695, theme="dark")
    page.run("for (const row of levels.rows) { const [, ...tasks] = row.cells;"
             " for (let n = 0; n < 4; n++) row.append(...tasks.map((cell) => cell.cloneNode(true))); }")  # fmt: skip
    assert page.run("return levels.rows[0].cells.length") == 11
    dark = {"media": "print", "features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
    brightness = "return Math.max(...getComputedStyle(document.querySelector('%s')).%s.match(/[0-9]+/g).slice(0, 3))"
    assert page.run(brightness % ("#levels td", "color")) < 64
    assert page.run(brightness % ("html", "backgroundColor")) == 255
    assert page.run("return levels.offsetWidth <= levels.parentElement.clientWidth")


# Machado, Oliveira and Fernandes (2009), complete deficiency, on linear RGB.
DEFICIENCIES = {
    "none": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    "grey": np.full((3, 3), [0.2126, 0.7152, 0.0722]),
}


@pytest.mark.parametrize("deficiency", DEFICIENCIES)
def test_severe_grades_are_brighter_whatever_colours_a_reader_sees(page, deficiency):
    page.run("facts.tasks[0].grades = ['1', '2', '3', '4', '5']")
    colours = page.run("return [0, 1, 2, 3, 4].map((grade) => severity(grade, 0))")
    rgb = np.array([[int(number) for number in re.findall(r"\d+", colour)] for colour in colours]) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    luminance = (linear @ np.transpose(DEFICIENCIES[deficiency])).clip(0, 1) @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(luminance) > 0.07).all()
