"""The report in a browser: headless Chromium draws it, and is asked what it shows. Skipped where there is none."""

import base64
import csv
import io

import numpy as np
import pytest
from PIL import Image

from spinejax.data.dataset import DataSet
from tests import browser
from tests.browser import chromium_driver
from tests.conftest import write_tiny
from tests.report.test_page import made_up, write

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    yield from chromium_driver(tmp_path_factory.mktemp("chromium"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return DataSet(write_tiny(tmp_path_factory.mktemp("data") / "tiny", num_patients=(1, 1, 3), num_shards=1))


@pytest.fixture(scope="module")
def address(data, tmp_path_factory):
    return write(tmp_path_factory.mktemp("report"), data)[0].as_uri()


class Page(browser.Page):
    """The report in the browser."""

    def settle(self):
        drawn = """const overlay = document.getElementById("overlay");
            const map = overlay && overlay.checked ? document.getElementById("opacity").value : "plain";
            return document.body.dataset.drawn === `${state.disc} ${state.task} ${state.slice} ${map}`"""
        self.wait_until(drawn)

    def picture(self):
        """The large canvas' pixels, float[448, 896, 3]."""
        self.settle()
        url = self.run('return document.getElementById("slice").toDataURL("image/png")')
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).convert("RGB")).astype(float)

    def state(self, name):
        return self.run(f"return state.{name}")

    def listed(self):
        return [row.text.replace("\n", " ") for row in self.driver.find_elements("css selector", "#list .disc")]


@pytest.fixture
def page(chromium, address):
    return Page(chromium, address)


def test_it_loads_without_console_messages_and_requests(page, address):
    page.press("picture", *(["\ue014"] * 3), "\ue015", "t", "o", "n")
    assert page.driver.get_log("browser") == []
    assert page.requests() == {address}


def test_the_policy_blocks_other_scripts(page):
    page.run('window.hit = 0; const s = document.createElement("script"); s.text = "hit = 1"; document.body.append(s);')
    assert page.run("return hit") == 0
    page.run('const i = new Image(); i.onerror = () => { hit = 2 }; i.src = "http://127.0.0.1:9/x.png";')
    page.wait_until("return hit === 2")
    assert any("Content Security Policy" in entry["message"] for entry in page.driver.get_log("browser"))


def test_the_slider_and_the_arrows_change_the_picture(page):
    page.press("overlay", " ")
    before = page.picture()
    page.press("number", "\ue014")
    assert page.state("slice") == 5
    after = page.picture()
    assert np.abs(after - before).mean() > 1
    page.press("picture", "\ue012")
    np.testing.assert_array_equal(page.picture(), before)
    page.press("picture", *(["\ue012"] * 12))
    assert page.state("slice") == 0
    assert "slice 1 of 9, 16 mm to the right" in page.find("where").text
    page.driver.find_elements("css selector", "#strip button")[8].click()
    assert page.state("slice") == 8
    assert "to the left" in page.find("where").text


def test_the_picture_is_the_window_as_the_network_sees_it(page, data):
    """Superior up, anterior left: the bright square of "front" discs is left of the middle."""
    page.press("overlay", " ")
    for place, row in enumerate(data.rows("test")):
        page.run(f"chooseDisc({place})")
        columns = page.picture()[100:348, :, 0].mean(0)
        bright = data.labels[row, 0]
        square = np.flatnonzero(columns < 70 if bright == 0 else columns > columns.mean() + 15)
        side = {0: "front", 1: "back"}[int(square.mean() > 448)]
        if data.labels[row, 1] >= 0:
            assert side == TASK_SIDE[data.labels[row, 1]]


TASK_SIDE = ("front", "back")


def test_the_overlay_toggles_and_has_an_opacity(page):
    page.run("chooseSlice(4)")
    with_map = page.picture()
    assert np.ptp(with_map, axis=2).max() > 60  # it is coloured
    page.find("overlay").click()
    plain = page.picture()
    assert np.ptp(plain, axis=2).max() < 3
    page.press("picture", "o")
    page.run('const o = document.getElementById("opacity"); o.value = 20; o.dispatchEvent(new Event("input"))')
    faint = page.picture()
    assert 0 < np.abs(faint - plain).mean() < 0.6 * np.abs(with_map - plain).mean()
    rows, columns = np.nonzero(np.ptp(with_map, axis=2) > 60)
    assert 75 < rows.min() < rows.max() < 165  # task 0, disc 0: rows 20 to 40, columns 30 to 80, four times as large
    assert 110 < columns.min() < columns.max() < 330
    assert "evidence for the score of Brightness" in page.find("traced").text


def test_filters_and_orders_of_the_list(page, data):
    graded, _ = made_up(data)
    assert len(page.listed()) == 9
    page.choose("scan", str(data.scan[graded.rows[3]]))
    assert len(page.listed()) == 3
    page.choose("level", "L5-S1")
    assert [line.split()[0] for line in page.listed()] == ["L5-S1"]
    assert page.find("count").text == "1 of 9 discs"
    page.choose("scan", "")
    page.choose("level", "")
    grades, labels = graded.probabilities["brightness"].argmax(1), graded.labels["brightness"]
    page.choose("rater", "differs")
    assert len(page.listed()) == np.sum((labels >= 0) & (grades != labels))
    page.choose("rater", "agrees")
    assert len(page.listed()) == np.sum((labels >= 0) & (grades == labels))
    page.choose("rater", "")
    page.choose("grade", "2")
    assert len(page.listed()) == np.sum(grades == 2)
    page.choose("grade", "")
    confidence = graded.probabilities["brightness"].max(1)
    page.choose("sort", "confidence")
    np.testing.assert_array_equal(page.state("shown"), np.argsort(confidence, kind="stable"))
    page.choose("sort", "disagreement")
    np.testing.assert_array_equal(page.state("shown"), np.argsort(-(np.abs(grades - labels) + confidence)))
    page.choose("sort", "spread")
    np.testing.assert_array_equal(page.state("shown"), np.argsort(-graded.spread["brightness"]))


def test_the_list_works_with_keys_and_marks_the_current_disc(page):
    page.press("list", "\ue015", "\ue015")
    assert page.state("disc") == 2
    chosen = page.driver.find_elements("css selector", '#list [aria-selected="true"]')
    assert [row.get_attribute("id") for row in chosen] == ["disc-2"]
    assert page.find("list").get_attribute("aria-activedescendant") == "disc-2"
    page.press("list", "\ue010")
    assert page.state("disc") == 8
    page.press("list", "\ue011")
    assert page.state("disc") == 0
    page.press("picture", "n", "n", "p", "t")
    assert (page.state("disc"), page.state("task")) == (1, 1)
    assert page.find("task-name").text == "Side"


def test_tab_reaches_every_control_and_focus_is_visible(page):
    seen, outlines = [], []
    page.run("document.activeElement.blur()")
    for _ in range(40):
        page.driver.switch_to.active_element.send_keys("\ue004")
        seen.append(page.run("return document.activeElement.id"))
        outlines.append(page.run("return getComputedStyle(document.activeElement).outlineStyle"))
        if seen[-1] == "opacity":
            break
    filters = ["search", "task", "scan", "level", "grade", "rater", "sure", "sort"]
    wanted = [*filters, "list", "previous", "next", "picture", "number", "overlay", "opacity"]
    assert [name for name in seen[seen.index("search") :] if name] == wanted
    assert "none" not in outlines


def test_every_control_has_a_name(page):
    unnamed = page.run(
        """const controls = "select, input, button, canvas#slice, svg:not([aria-hidden]), [role=listbox], [tabindex]";
            return [...document.querySelectorAll(controls)]
            .filter((e) => !(e.getAttribute("aria-label") || e.textContent.trim() || (e.labels && e.labels.length)))
            .map((e) => e.outerHTML)"""
    )
    assert unnamed == []


def test_the_raters_grade_is_beside_the_networks(page, data):
    row = data.rows("test")[0]
    label = data.labels[row, 0]
    lines = page.driver.find_elements("css selector", "#chances tbody tr")
    assert ["rater" in line.text for line in lines] == [grade == label for grade in range(3)]
    assert f"The rater gave {data.tasks[0].grades[label]}." in page.find("doubt").text


@pytest.mark.parametrize("width", [1366, 390])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_fits_its_width_in_both_themes(chromium, address, width, theme):
    page = Page(chromium, address, width=width, theme=theme)
    assert page.run("return document.documentElement.scrollWidth") <= width
    shade = page.run("return getComputedStyle(document.documentElement).backgroundColor")
    assert (sum(map(int, shade[4:-1].split(","))) > 380) == (theme == "light")


def test_it_works_without_hotspots(chromium, data, tmp_path):
    page = Page(chromium, write(tmp_path, data, hotspots=False)[0].as_uri())
    before = page.picture()
    page.press("picture", "\ue014", "o")
    assert np.abs(page.picture() - before).mean() > 1
    assert page.driver.get_log("browser") == []


PIXELS = """[...document.getElementById("slice").getContext("2d").getImageData(0, 0, 896, 448).data]
    .reduce((most, value) => Math.max(most, value), 0)"""


@pytest.fixture
def large(data, tmp_path):
    """A report of a set that counts as large: three chunks of one scan each."""
    return write(tmp_path, data, discs_per_page=3)[0]


def test_a_large_set_loads_its_pictures_as_they_are_needed(chromium, data, large, address):
    page = Page(chromium, large.as_uri())
    assert len(page.listed()) == 9
    assert page.requests() == {large.as_uri(), (large.parent / "discs-0001.js").as_uri()}
    first = page.picture()
    page.run("chooseDisc(7)")
    last = page.picture()
    assert (large.parent / "discs-0003.js").as_uri() in page.requests()
    page.run("chooseDisc(6)")
    page.settle()
    assert page.requests() == set()  # the same chunk
    assert page.driver.get_log("browser") == []
    whole = Page(chromium, address)
    np.testing.assert_array_equal(whole.picture(), first)
    whole.run("chooseDisc(7)")
    np.testing.assert_array_equal(whole.picture(), last)


def test_only_a_few_chunks_are_kept(chromium, large):
    page = Page(chromium, large.as_uri())
    page.run("for (let n = 0; n < 6; n++) chunks.set(100 + n, Promise.resolve({}))")
    page.run("chooseDisc(4)")
    page.picture()
    assert page.run("return chunks.size") <= 6 + 1
    assert page.run("return chunks.has(0)") is False


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda path: path.unlink(), "discs-0002.js is missing"),
        (lambda path: path.write_text("keepChunk("), "discs-0002.js is damaged"),
        (lambda path: path.write_text('keepChunk("of another",1,{});'), "discs-0002.js is of another report"),
    ],
)
def test_a_chunk_that_is_lost_is_named_and_the_grades_stay(chromium, large, damage, fault):
    damage(large.parent / "discs-0002.js")
    page = Page(chromium, large.as_uri())
    assert not page.find("missing").is_displayed()
    page.run("chooseDisc(4)")
    page.wait_until("return document.body.dataset.drawn === '4 0 4 plain'")  # without pictures, no hotspot either
    assert fault in page.find("missing").text
    assert page.run(f"return {PIXELS}") == 0
    assert len(page.driver.find_elements("css selector", "#chances tbody tr")) == 3
    page.run("chooseDisc(0)")
    assert page.picture().max() > 0


def test_a_large_set_lets_no_other_script_in(chromium, large, tmp_path):
    (large.parent / "other.js").write_text("hit = 3")
    text = large.read_text().replace("<main>", '<main><script src="other.js"></script><script>hit = 4</script>')
    large.write_text(text)
    page = Page(chromium, large.as_uri())
    page.picture()
    assert page.run("return typeof hit") == "undefined"


def test_discs_are_searched_by_patient_level_and_confidence(page, data):
    graded, _ = made_up(data)
    rows = graded.rows
    scan = str(data.scan[rows[4]])
    assert not page.find("list-turn").is_displayed()  # nine discs are one part
    page.find("search").send_keys(f"{scan} l5")
    page.settle()
    wanted = [place for place, row in enumerate(rows) if data.scan[row] == scan and data.level[row] == "L5-S1"]
    assert page.state("shown") == wanted
    assert len(wanted) == 1
    page.run("element('search').value = 'patient 2'; list()")
    patients = list(dict.fromkeys(data.patient[rows].tolist()))
    assert page.state("shown") == np.flatnonzero(data.patient[rows] == patients[1]).tolist()
    page.find("search").send_keys("npto")  # letters, not keys of the page
    assert (page.state("shown"), page.state("task")) == ([], 0)
    page.run("element('search').value = ''; list()")
    confidence = graded.probabilities["brightness"].max(1)
    for below in ("0.5", "0.7", "0.9"):
        page.choose("sure", below)
        assert page.state("shown") == np.flatnonzero(confidence < float(below)).tolist()


def test_the_table_follows_the_filters_and_is_saved_as_csv(page, data):
    graded, _ = made_up(data)
    page.choose("level", "L5-S1")
    page.driver.find_element("css selector", "#as-table summary").click()
    page.wait_until("return document.querySelector('#table tbody').children.length > 0")
    places = [place for place, row in enumerate(graded.rows) if data.level[row] == "L5-S1"]
    lines = page.driver.find_elements("css selector", "#table tbody tr")
    assert len(lines) == len(places) == 3
    for line, place in zip(lines, places, strict=True):
        grades = [task.grades[graded.probabilities[task.name][place].argmax()] for task in graded.tasks]
        assert [cell.text.split()[0] for cell in line.find_elements("css selector", "td")] == ["L5-S1", *grades]
    page.run("URL.createObjectURL = (blob) => { window.saved = blob.text(); return '#'; };")
    page.find("save").click()
    saved = page.driver.execute_async_script("saved.then(arguments[0])")
    rows = list(csv.DictReader(io.StringIO(saved, newline="")))
    assert [row["scan"] for row in rows] == [data.scan[graded.rows[place]] for place in places]
    assert {"patient", "name", "level", "brightness", "brightness_probability", "side_rater"} <= set(rows[0])
    page.choose("level", "")
    assert len(page.driver.find_elements("css selector", "#table tbody tr")) == 9


def test_a_long_list_is_shown_in_parts(chromium, address):
    page = Page(chromium, address)
    page.run(
        """const disc = facts.discs[0];
        const more = {...disc, best: undefined, p: [[1, 0, 0], [1, 0]]};
        while (facts.discs.length < 700) facts.discs.push({...more});
        list();"""
    )
    assert page.find("list-range").text == "1 to 300"
    assert len(page.listed()) == 300
    page.find("list-later").click()
    assert (page.find("list-range").text, page.state("disc")) == ("301 to 600", 300)
    page.run("chooseDisc(650)")
    assert page.find("list-range").text == "601 to 700"
    chosen = page.driver.find_elements("css selector", '#list [aria-selected="true"]')
    assert [row.get_attribute("id") for row in chosen] == ["disc-650"]
    assert not page.find("list-later").is_enabled()
    page.press("list", "\ue011")  # Home
    assert (page.find("list-range").text, page.state("disc")) == ("1 to 300", 0)
