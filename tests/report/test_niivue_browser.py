"""NiiVue's page in headless Chromium, whose WebGL is drawn in software."""

import io

import numpy as np
import pytest
from PIL import Image

from spinejax.data.dataset import DataSet
from spinejax.report import niivue
from tests import browser
from tests.browser import chromium_driver
from tests.report.axe import needs_axe, violations
from tests.report.spine_set import write_spines
from tests.report.test_niivue import pages

pytestmark = pytest.mark.browser

LEFT, RIGHT, UP, DOWN, PAGE_UP = "\ue012\ue014\ue013\ue015\ue00e"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    yield from chromium_driver(tmp_path_factory.mktemp("chromium"), webgl=True)


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("niivue")
    pages(folder / "page", DataSet(write_spines(folder / "set")))
    return (folder / "page" / "index.html").as_uri()


class Page(browser.Page):
    """The page in the browser."""

    def settle(self):
        self.wait_until("return document.body.dataset.drawn === JSON.stringify(choice())")

    def where(self):
        return self.find("where").text

    def place_mm(self):
        return np.array(self.run("return Array.from(viewer.frac2mm(viewer.scene.crosshairPos, 0, true))")[:3])

    def glowing(self):
        """How many pixels of the picture are red or yellow, as only hotspots are."""
        self.run("viewer.drawScene()")
        png = self.find("canvas").screenshot_as_png
        red, _, blue = np.moveaxis(np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int), 2, 0)
        return int((red - blue > 60).sum())


@pytest.fixture
def page(chromium, address):
    return Page(chromium, address)


def test_it_asks_for_nothing_and_says_nothing(page, address):
    page.choose("planes", "2")
    page.press("canvas", "n", "t", "o", "m", UP)
    assert page.console() == []
    assert {url for url in page.requests() if not url.startswith("chrome:")} == {address}


def test_the_cross_goes_to_the_disc_that_is_chosen(page):
    page.press("masks", " ")
    discs = page.driver.find_elements("css selector", "#discs button")
    assert [disc.text.split()[0] for disc in discs] == ["L2-L3", "L3-L4", "L4-L5", "L5-S1"]
    for number, level in enumerate(["L2-L3", "L3-L4", "L4-L5", "L5-S1"]):
        page.driver.find_elements("css selector", "#discs button")[number].click()
        page.settle()
        assert page.where().endswith(f"· {level}")
        assert page.driver.find_element("css selector", "[aria-current=true]").text.startswith(level)


def test_hotspots_glow_over_the_scan_and_are_switched_off(page):
    before = page.glowing()
    assert before > 20
    page.press("hotspots", " ")
    assert page.glowing() == 0
    page.press("hotspots", " ")
    assert page.glowing() == before
    page.choose("task", "1")  # which has no hotspot
    assert page.glowing() == 0


def test_keys_move_through_the_scan(page):
    for key, axis, sign in ((LEFT, 0, 1), (RIGHT, 0, -1), (UP, 2, 1), (DOWN, 2, -1), (PAGE_UP, 1, 1)):
        before = page.place_mm()
        page.press("canvas", key)
        moved = page.place_mm() - before
        assert np.abs(moved).argmax() == axis
        assert np.sign(moved[axis]) == sign
    disc = page.run("return state.disc")
    page.press("canvas", "n")
    assert page.run("return state.disc") == (disc + 1) % 4
    page.press("canvas", "p", "t", "m")
    assert page.run("return state.disc") == disc
    assert page.find("discs-of").text == "Side"
    assert page.find("masks").is_selected()


def test_the_right_of_the_patient_is_on_the_left(page):
    page.choose("planes", "1")
    assert page.run("return [viewer.opts.isRadiologicalConvention, viewer.opts.sagittalNoseLeft]") == [True, True]


def test_a_scan_of_few_slices_begins_with_the_sagittal_plane(chromium, tmp_path, monkeypatch):
    monkeypatch.setattr(niivue, "FEW_SLICES", 99)
    pages(tmp_path / "page", DataSet(write_spines(tmp_path / "set")))
    assert Page(chromium, (tmp_path / "page" / "index.html").as_uri()).run("return viewer.opts.sliceType") == 2


def test_without_webgl_the_page_says_so(chromium, address):
    hide = "HTMLCanvasElement.prototype.getContext = () => null"
    script = chromium.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": hide})
    try:
        chromium.get(address)
        assert "no WebGL 2" in chromium.find_element("id", "fault").text
    finally:
        chromium.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", script)


@needs_axe
@pytest.mark.parametrize(("width", "theme"), [(1366, "light"), (390, "dark")])
def test_axe_finds_no_fault(chromium, address, width, theme):
    assert violations(Page(chromium, address, width=width, theme=theme)) == []


def test_a_phone_shows_it_without_scrolling_sideways(chromium, address):
    page = Page(chromium, address, width=390, height=844)
    assert page.run("return document.documentElement.scrollWidth") <= 390
