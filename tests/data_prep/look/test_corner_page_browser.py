"""Corners and levels corrected in headless Chromium, saved, and read by `scans --corners`. Skipped without Chromium."""

import copy
import json
import time

import numpy as np
import pytest

from data_prep.__main__ import main
from data_prep.anatomy.corner_file import bodies_from_corners, read_corners
from data_prep.anatomy.discs import extract_discs, window_in_scan
from data_prep.anatomy.vertebrae import NAMES as VERTEBRAE
from data_prep.anatomy.vertebrae import bodies_from_spider_mask
from data_prep.read.metaimage import write_mha
from data_prep.read.nifti import write_nifti
from data_prep.read.scan import Scan
from spinejax.data.dataset import DataSet
from spinejax.errors import SpinejaxError
from tests import browser
from tests.block_spine import block_spine
from tests.browser import chromium_driver

pytestmark = pytest.mark.browser

SPINE = block_spine(spacing_mm=(1.1, 0.7, 4.0), angles_deg=(6.0, -4.0))  # oblique, with oblong pixels
BODIES = bodies_from_spider_mask(SPINE.mask)[0]
NAMES = [body.name for body in BODIES]
HOSTILE = '</script><b id="hit">\'&\u00e9'
UP, DOWN, LEFT, RIGHT, SHIFT, ENTER, DELETE, ESCAPE, TAB = "\ue013\ue015\ue012\ue014\ue008\ue007\ue017\ue00c\ue004"


def corner_file(path, scans):
    """A corner file of bodies, as a person or a program would write it."""

    def marked(body):
        points = np.c_[body.corners, np.full(4, body.mid_slice), np.ones(4)] @ SPINE.scan.affine.T
        corners = [None if np.isnan(point).any() else point[:3].tolist() for point in points]
        return {"corners_mm": corners, "width_mm": 36}

    content = {key: {body.name: marked(body) for body in bodies} for key, bodies in scans.items()}
    path.write_text(json.dumps({"scans": content}))
    return path


def spoiled():
    """The bodies with the lower front corner of L3 displaced, and that corner's true place."""
    bodies = bodies_from_spider_mask(SPINE.mask)[0]
    body = bodies[NAMES.index("L3")]
    true = body.corners[3].copy()
    body.corners[3] += (-9.0, 13.0)
    return bodies, true


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two scans whose corners are known, one of them spoiled, and one without; their page; and discs of the truth."""
    root = tmp_path_factory.mktemp("review")
    (root / "images" / "<").mkdir(parents=True)
    for number, name in enumerate(("a_t2", "b_t2", "c_t2")):
        write_mha(root / "images" / f"{name}.mha", Scan(SPINE.scan.voxels + np.float32(number), SPINE.scan.affine, ""))
    corners = corner_file(root / "spoiled.json", {"a_t2": spoiled()[0], "b_t2": BODIES})
    command = [str(root / "images"), "--corners", str(corners)]
    assert main(["overlay", *command, "--out", str(root / "qc.html")]) == 0
    corner_file(root / "true.json", dict.fromkeys(("a_t2", "b_t2", "c_t2"), BODIES))
    assert discs(root, root / "true.json") == 0
    return root


def discs(root, corners, name=None, *options):
    out = root / (name or corners.stem)
    return main(["scans", str(root / "images"), "--corners", str(corners), "--out", str(out), "--overwrite", *options])


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    yield from chromium_driver(tmp_path_factory.mktemp("chromium"))


class Page(browser.Page):
    """The page in the browser. Points are (row, column) of the scan."""

    def __init__(self, driver, path, **options):
        self.folder = path.parent
        self.saved = self.folder / "corners.json"
        self.saved.unlink(missing_ok=True)
        behaviour = {"behavior": "allow", "downloadPath": str(self.folder)}
        driver.execute_cdp_cmd("Browser.setDownloadBehavior", behaviour)
        driver.get("about:blank")  # the dialog that asks whether to leave changes unsaved would stay
        super().__init__(driver, path.as_uri(), **options)

    def open_scan(self, key):
        self.run(f"chooseScan(scans.findIndex((scan) => (scan.key || scan.name) === {json.dumps(key)}))")

    def corner(self, name, which):
        return self.run(f'return current().bodies.find((body) => body.name === "{name}").corners[{which}]')

    def names(self):
        return self.run("return current().bodies.map((body) => body.name)")

    def on_screen(self, point):
        row, column = (point * SPINE.scan.spacing_mm[:2]).tolist()
        place = f"new DOMPoint({column}, {row}).matrixTransform(element('picture').getScreenCTM())"
        self.run("element('picture').scrollIntoView({ block: 'center' })")
        return self.run(f"const at = {place}; return [at.x, at.y]")

    def mouse(self, kind, point, **more):
        x, y = self.on_screen(np.asarray(point))
        event = {"type": f"mouse{kind}", "x": x, "y": y, "button": "left", "buttons": 1, "clickCount": 1}
        self.driver.execute_cdp_cmd("Input.dispatchMouseEvent", event | more)

    def click(self, point):
        self.mouse("Pressed", point)
        self.mouse("Released", point)

    def drag(self, start, stop):
        self.mouse("Pressed", start)
        for share in (0.3, 0.7, 1.0):
            self.mouse("Moved", np.asarray(start) + share * (np.asarray(stop) - start))
        self.mouse("Released", stop)

    def touch(self, kind, point):
        points = []
        if point is not None:
            x, y = self.on_screen(np.asarray(point))
            points = [{"x": x, "y": y}]
        self.driver.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": f"touch{kind}", "touchPoints": points})

    def active(self, *keys):
        """Keys for what has the focus."""
        self.driver.switch_to.active_element.send_keys(*keys)

    def tab(self):
        from selenium.webdriver import ActionChains

        ActionChains(self.driver).send_keys(TAB).perform()

    def save(self, *, by_key=False):
        """Save, and give what was saved."""
        self.saved.unlink(missing_ok=True)
        if by_key:
            self.find("save").send_keys(ENTER)
        else:
            self.find("save").click()
        end = time.monotonic() + 20
        # Chromium keeps the name with an empty file, and then renames the whole one to it.
        while not self.saved.exists() or self.saved.stat().st_size == 0:
            assert time.monotonic() < end, "no file was saved"
            time.sleep(0.05)
        return json.loads(self.saved.read_text())["scans"]

    def load(self, path):
        self.run("element('status').textContent = ''")
        self.find("load").send_keys(str(path))
        self.wait_until("return element('status').textContent !== ''")
        return self.find("status").text

    def faults(self):
        return self.find("faults").text


@pytest.fixture
def page(chromium, root):
    return Page(chromium, root / "qc.html")


def apart_mm(root, name, keys=("a_t2", "b_t2", "c_t2")):
    """The farthest that a corner of a disc's window is from the true one, over the discs of a data set."""
    true, other = DataSet(root / "true"), DataSet(root / name)
    assert len(other) == len(true) * len(keys) // 3
    corners = np.array([[40, 48, 7, 1], [152, 48, 7, 1], [40, 272, 7, 1], [152, 272, 7, 1]])
    worst = 0.0
    for row in range(len(other)):
        same = next(r for r in range(len(true)) if true.level[r] == other.level[row])  # all scans share a grid
        difference = (other.affine[row] - true.affine[same]) @ corners.T
        worst = max(worst, float(np.linalg.norm(difference[:3], axis=0).max()))
    return worst


# The round trip ------------------------------------------------------------------------------------------------------


def test_a_dragged_corner_gives_the_discs_of_the_truth(page, root):
    assert discs(root, root / "spoiled.json") == 2  # c_t2 has no corners
    assert apart_mm(root, "spoiled", ("a_t2", "b_t2")) > 2
    bodies, true = spoiled()
    page.open_scan("a_t2")
    boxes = "return [...document.querySelectorAll('.box')].map((box) => box.getAttribute('points'))"
    before = page.run(boxes)
    start = bodies[NAMES.index("L3")].corners[3]
    page.mouse("Pressed", start)
    page.mouse("Moved", (start + true) / 2)
    halfway = page.run(boxes)
    page.mouse("Moved", true)
    page.mouse("Released", true)
    changed = [old != new for old, new in zip(before, halfway, strict=True)]
    assert changed == [level == "L3-L4" for level in ("L2-L3", "L3-L4", "L4-L5", "L5-S1")]  # drawn while it moves
    np.testing.assert_allclose(page.corner("L3", 3)[:2], true, atol=0.01)
    saved = page.save()
    assert set(saved) == {"a_t2", "b_t2"}
    assert discs(root, page.saved, "dragged") == 2
    assert apart_mm(root, "dragged", ("a_t2", "b_t2")) < 0.02


def test_what_is_saved_are_the_patients_coordinates(page):
    page.open_scan("b_t2")
    saved = page.save()["b_t2"]
    assert list(saved) == NAMES
    for body in BODIES:
        points = np.c_[body.corners, np.full(4, body.mid_slice), np.ones(4)] @ SPINE.scan.affine.T
        for point, corner in zip(points[:, :3], saved[body.name]["corners_mm"], strict=True):
            assert (corner is None) == np.isnan(point).any()
            if corner is not None:
                np.testing.assert_allclose(corner, point, atol=1e-3)


def test_boxes_are_those_that_discs_are_cut_out_of(page):
    page.open_scan("b_t2")
    shown = {each["level"]: each["box"] for each in page.run("return discs(current())")}
    for disc in extract_discs(SPINE.scan, BODIES):
        expected = window_in_scan(SPINE.scan, disc.affine) * SPINE.scan.spacing_mm[:2]
        np.testing.assert_allclose(shown[disc.level], expected, atol=0.02)


def test_a_finger_drags_a_corner(chromium, root):
    chromium.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
    try:
        page = Page(chromium, root / "qc.html", width=390, height=844)
        page.open_scan("a_t2")
        bodies, true = spoiled()
        start = bodies[NAMES.index("L3")].corners[3]
        page.touch("Start", start + 1)  # fingers are not exact: the corner keeps its distance from the finger
        for share in (0.2, 0.6, 1.0):
            page.touch("Move", start + 1 + share * (true - start))
        page.touch("End", None)
        np.testing.assert_allclose(page.corner("L3", 3)[:2], true, atol=0.05)
        assert page.run("return current().past.length") == 1
    finally:
        chromium.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})


def test_keys_alone_correct_and_save(page, root):
    page.run("document.activeElement.blur()")
    while page.run("return document.activeElement.id") != "picture":
        page.tab()
    while page.run("return current().key") != "a_t2":
        page.active("n")
    page.active("b")
    while page.run("return current().bodies[state.body].name") != "L3":
        page.active("b")
    page.active("c", "c", "c")
    assert "L3, lower anterior corner" in page.run("return document.activeElement.getAttribute('aria-label')")
    row, column, _ = page.corner("L3", 3)
    page.active(SHIFT, DOWN, "\ue000", DOWN, DOWN, DOWN, DOWN)
    assert page.corner("L3", 3)[:2] == pytest.approx([row + 9, column])
    page.active(SHIFT, LEFT, LEFT, "\ue000", LEFT, LEFT, LEFT)
    np.testing.assert_allclose(page.corner("L3", 3)[:2], spoiled()[1], atol=1e-6)
    page.active(ESCAPE)
    assert page.run("return state.body") is None
    page.save(by_key=True)
    assert discs(root, page.saved, "typed") == 2
    assert apart_mm(root, "typed", ("a_t2", "b_t2")) < 0.02


# Levels --------------------------------------------------------------------------------------------------------------


def test_all_names_shift_by_one_and_the_discs_with_them(page, root):
    page.open_scan("b_t2")
    page.find("up").click()
    assert page.names() == [
        "T12" if name == "L1" else f"L{int(name[1]) - 1}" if name != "S1" else "L5" for name in NAMES
    ]
    assert page.driver.find_elements("css selector", "#table .was")[0].text.startswith("was ")
    assert "Compared with before: no longer L5-S1; new L1-L2" in page.find("discs").text
    page.run("document.querySelector('[value=\"changed\"]').click()")
    assert set(page.save()) == {"b_t2"}
    assert discs(root, page.saved, "shifted") == 2
    shifted, true = DataSet(root / "shifted"), DataSet(root / "true")
    assert sorted(shifted.level) == ["L1-L2", "L2-L3", "L3-L4", "L4-L5"]
    for level, was in (("L1-L2", "L2-L3"), ("L4-L5", "L5-S1")):
        [row] = np.flatnonzero(shifted.level == level)
        np.testing.assert_allclose(shifted.affine[row], true.affine[np.flatnonzero(true.level == was)[0]], atol=1e-3)
    page.find("down").click()
    assert page.names() == NAMES
    assert page.run("return scans.filter((scan) => scan.changed).length") == 0
    page.find("down").click()
    assert "S1 has no name below it and was removed" in page.find("status").text
    assert page.names()[-1] == "S1"
    page.find("undo").click()
    assert page.names() == NAMES


def test_names_must_be_unique_and_in_order_or_nothing_is_saved(page):
    page.open_scan("b_t2")
    place = NAMES.index("L4")
    select = f"document.querySelectorAll('#table select')[{place}]"
    page.run(f"{select}.focus()")
    page.active("L3")
    assert "Two vertebrae are called L3" in page.faults()
    assert not page.find("save").is_enabled()
    assert "b_t2: Two vertebrae are called L3." in page.find("blocked").text
    assert page.run(f"return document.activeElement === {select}")  # and so the next key works, too
    page.run(f"{select}.value = 'T9'; {select}.dispatchEvent(new Event('change'))")
    assert "L3 is above T9: names must run from the top down" in page.faults()
    page.run(f"{select}.value = 'L4'; {select}.dispatchEvent(new Event('change'))")
    assert page.faults() == ""
    assert page.find("save").is_enabled()


def test_an_absent_vertebra_is_removed(page):
    page.open_scan("b_t2")
    index = NAMES.index("L4")
    page.driver.find_elements("css selector", "#table td button")[index].click()
    assert page.names() == [name for name in NAMES if name != "L4"]
    assert "No L4 between L3 and L5" in page.faults()
    assert "no longer L3-L4, L4-L5" in page.find("discs").text
    assert page.find("save").is_enabled()
    page.find("picture").send_keys("b", DELETE)
    assert page.names()[0] == NAMES[1]
    assert "L4" not in page.save()["b_t2"]


def test_corners_of_a_failed_scan_are_clicked(page, root):
    page.open_scan("c_t2")
    assert "the corner file has no scan 'c_t2'" in page.find("doubts").text
    page.find("add").click()
    s1 = BODIES[-1].corners
    assert page.find("placing").text == "S1: click its upper anterior corner (1 of 2). Esc cancels."
    for corner in s1[:2]:
        page.click(corner)
    assert page.corner("S1", 2) is None
    assert "Only S1 is marked" in page.faults()
    assert not page.find("save").is_enabled()
    for body in BODIES[-2::-1]:
        page.find("picture").send_keys("a")
        assert page.find("placing").text.startswith(f"{body.name}: click its upper anterior corner (1 of 4)")
        for corner in body.corners:
            page.click(corner)
    assert page.names() == NAMES
    assert page.faults() == ""
    page.choose("show", "changed")
    assert page.find("count").text == "1 of 3 scans; 0 looked at, 1 changed"
    assert "width_mm" not in page.save()["c_t2"]["L4"]  # it is not known: the reader's usual one
    page.choose("show", "")
    page.drag(spoiled()[0][0].corners[0], (0, 0))  # of another scan's L1: nothing is there, so nothing moves
    assert discs(root, page.saved, "clicked") == 0
    levels = DataSet(root / "clicked").level
    assert len(levels) == 3 * (len(NAMES) - 1)
    assert apart_mm(root, "clicked") > 2  # a_t2 is still spoiled


def test_a_cross_places_corners_by_keys(page):
    page.open_scan("c_t2")
    page.find("picture").send_keys("a")
    row, column = page.run("return state.placing.cursor")
    page.active(SHIFT, LEFT, "\ue000", UP, ENTER)
    page.active(SHIFT, RIGHT, RIGHT, RIGHT, RIGHT, RIGHT, RIGHT, RIGHT, RIGHT, RIGHT, RIGHT, "\ue000", ENTER)
    assert page.corner("S1", 0)[:2] == pytest.approx([row - 1, column - 5])
    assert page.corner("S1", 1)[:2] == pytest.approx([row - 1, column + 45])
    page.find("picture").send_keys("a", ENTER, ESCAPE)
    assert page.names() == ["S1"]
    assert page.run("return state.placing") is None


def test_missing_corners_of_a_body_are_placed(page):
    page.open_scan("b_t2")
    page.find("up").click()  # S1 is now called L5, which needs lower corners
    buttons = page.driver.find_elements("css selector", "#table td button")
    next(button for button in buttons if button.text == "+ lower").click()
    own = page.corner("L5", 0)[2]
    page.run("chooseSlice(2)")
    for corner in SPINE.corners["S1"][2:]:
        page.click(corner)
    np.testing.assert_allclose([page.corner("L5", which)[:2] for which in (2, 3)], SPINE.corners["S1"][2:], atol=0.5)
    assert page.corner("L5", 3)[2] == own  # in the body's own middle, whatever slice is shown


def test_corners_in_the_wrong_order_are_faults(page):
    page.open_scan("b_t2")
    front, back = page.corner("L4", 0), page.corner("L4", 1)
    page.run("change((scan) => { const c = scan.bodies[2].corners; [c[0], c[1]] = [c[1], c[0]]; })")
    assert "L4: its front corner is behind its back corner" in page.faults()
    page.find("undo").click()
    assert (page.corner("L4", 0), page.corner("L4", 1)) == (front, back)
    page.run("change((scan) => scan.bodies[2].corners.reverse())")
    assert "L4: its corners are not in order: it is upside down" in page.faults()


def test_what_the_page_lets_through_is_what_the_reader_takes(page, tmp_path):
    """Bodies displaced, turned, swapped and renamed at random: the page calls wrong what `--corners` would refuse."""
    page.open_scan("b_t2")
    bodies = page.run("return current().bodies")
    rng, variants = np.random.default_rng(0), []
    for _ in range(300):
        changed = copy.deepcopy(bodies)
        body = changed[rng.integers(len(changed))]
        kind = rng.integers(5)
        if kind == 0:  # a corner, anywhere
            body["corners"][rng.integers(2)][:2] = rng.uniform(-40, 240, 2).tolist()
        elif kind == 1:  # the whole body, a little or far
            shift = [*rng.normal(0, 60, 2), rng.normal(0, 8)]
            body["corners"] = [corner and np.add(corner, shift).tolist() for corner in body["corners"]]
        elif kind == 2:
            body["corners"] = [body["corners"][place] for place in rng.permutation(4)]
        elif kind == 3:  # turned about its centre
            turn = rng.uniform(-np.pi, np.pi)
            points = np.array([corner for corner in body["corners"] if corner]) * SPINE.scan.spacing_mm
            centre = points.mean(0)
            matrix = [[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]]
            again = iter((((points - centre) @ np.transpose(matrix) + centre) / SPINE.scan.spacing_mm).tolist())
            body["corners"] = [corner and next(again) for corner in body["corners"]]
        else:
            free = sorted(set(VERTEBRAE) - {other["name"] for other in changed})
            body["name"] = free[rng.integers(len(free))]
        variants.append(changed)
    judged = page.driver.execute_script(
        "const scan = current(); return arguments[0].map((bodies) => "
        "{ const made = { ...scan, bodies }; return [faults(made).wrong, entry(made)]; })",
        variants,
    )
    refusals = [refusal(entry, tmp_path / "corners.json") for _, entry in judged]
    assert [bool(wrong) for wrong, _ in judged] == [bool(reason) for reason in refusals]
    assert 50 < sum(map(bool, refusals)) < 250


def refusal(entry, path):
    """Why a scan's part of a corner file is not read; "" if it is."""
    path.write_text(json.dumps({"scans": {"b_t2": entry}}))
    try:
        bodies_from_corners(SPINE.scan, read_corners(path)["b_t2"])
    except SpinejaxError as error:
        return str(error)
    return ""


# Undo, files, and what is remembered ---------------------------------------------------------------------------------


def test_undo_redo_and_reset(page):
    page.open_scan("b_t2")
    page.find("picture").send_keys("c", DOWN, DOWN)
    row = page.corner(NAMES[0], 0)[0]
    page.find("picture").send_keys("\ue009", "z", "\ue000")
    assert page.corner(NAMES[0], 0)[0] == row - 1
    page.find("redo").click()
    assert page.corner(NAMES[0], 0)[0] == row
    page.find("undo").click()
    page.find("undo").click()
    assert not page.find("undo").is_enabled()
    assert page.run("return scans.filter((scan) => scan.changed).length") == 0
    page.find("redo").click()
    page.find("down").click()
    page.find("reset").click()
    assert page.names() == NAMES
    assert not page.find("reset").is_enabled()
    page.find("undo").click()  # a reset can be undone, too
    assert page.names() != NAMES


def test_a_saved_file_is_loaded_and_continued(page, root, tmp_path):
    saved = json.loads((root / "true.json").read_text())
    saved["scans"]["other"] = saved["scans"]["a_t2"]
    saved["scans"][HOSTILE] = saved["scans"]["a_t2"]
    (tmp_path / "earlier.json").write_text(json.dumps(saved))
    told = page.load(tmp_path / "earlier.json")
    assert told == "earlier.json: 3 scans of this page loaded; 2 other scans are kept and saved again."
    page.open_scan("a_t2")
    np.testing.assert_allclose(page.corner("L3", 3)[:2], spoiled()[1], atol=1e-6)
    page.run("document.querySelector('[value=\"changed\"]').click()")
    page.find("picture").send_keys("c", DOWN)
    again = page.save()
    assert set(again) >= {"a_t2", "c_t2", "other", HOSTILE}
    assert again["other"] == saved["scans"]["other"]
    assert again["a_t2"]["L3"]["width_mm"] == 36
    assert discs(root, page.saved, "continued", "--detect-missing") in (0, 2)


def test_a_scan_may_be_called_by_its_other_name(page, root, tmp_path):
    page.run("scans.find((scan) => scan.key === 'c_t2').alias = '1.2.3'")
    content = json.loads((root / "true.json").read_text())["scans"]
    (tmp_path / "uid.json").write_text(json.dumps({"scans": {"1.2.3": content["c_t2"]}}))
    assert page.load(tmp_path / "uid.json") == "uid.json: 1 scans of this page loaded."
    assert "c_t2" in page.save()


def test_an_unchanged_scan_stays_unchanged_when_its_own_file_is_loaded(page, tmp_path):
    page.save()
    kept = tmp_path / "kept.json"
    page.saved.rename(kept)
    page.load(kept)
    assert page.run("return scans.filter((scan) => scan.changed).length") == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "it is not JSON"),
        ("[]", 'it has no "scans"'),
        ('{"scans": {}, "coordinateSystem": "LAS"}', "neither LPS nor RAS"),
        ('{"scans": {"a_t2": {"L9": {}}}}', "a_t2, L9: expected one of T9"),
        ('{"scans": {"a_t2": {"L4": {"corners_mm": [[1, 2], null, null, null]}}}}', "expected corners_mm with four"),
        ('{"scans": {"a_t2": {"L4": {"corners_mm": [null, [1, 2, 3], [1, 2, 3], null]}}}}', "neither its upper nor"),
        (
            '{"scans": {"a_t2": {"L4": {"corners_mm": [[1, 2, 3], [1, 2, 3], null, null], "width_mm": 400}}}}',
            "width_mm from 5 to 100",
        ),
    ],
)
def test_a_file_that_is_no_corner_file_is_refused_and_changes_nothing(page, tmp_path, content, message):
    (tmp_path / "bad.json").write_text(content)
    told = page.load(tmp_path / "bad.json")
    assert "bad.json cannot be loaded" in told
    assert message in told
    assert page.run("return scans.filter((scan) => scan.changed).length") == 0


def test_a_file_in_ras_is_read_if_it_says_so_and_refused_by_that_word_if_not(page, root, tmp_path):
    """Slicer wrote points in RAS by default for years; read as LPS they are a mirror image (SlicerMorph, issue 82)."""
    content = json.loads((root / "true.json").read_text())
    for bodies in content["scans"].values():
        for body in bodies.values():
            body["corners_mm"] = [point and [-point[0], -point[1], point[2]] for point in body["corners_mm"]]
    (tmp_path / "ras.json").write_text(json.dumps(content))
    assert 'inside it in RAS. Write "coordinateSystem": "RAS"' in page.load(tmp_path / "ras.json")
    assert page.run("return scans.filter((scan) => scan.changed).length") == 0
    (tmp_path / "says.json").write_text(json.dumps({"coordinateSystem": "RAS"} | content))
    assert page.load(tmp_path / "says.json") == "says.json: 3 scans of this page loaded."
    page.open_scan("a_t2")
    np.testing.assert_allclose(page.corner("L3", 3)[:2], spoiled()[1], atol=1e-6)


def test_pixels_seven_times_as_wide_as_high_are_drawn_in_proportion(chromium, tmp_path):
    """Where rows and columns count as equal, such an image is a sliver (spinalcordtoolbox, issues 3055 and 4563)."""
    spine = block_spine(spacing_mm=(0.35, 2.46, 4.0), tilt_deg=0.0)
    (tmp_path / "images").mkdir()
    write_mha(tmp_path / "images" / "a_t2.mha", spine.scan)
    write_mha(tmp_path / "a_t2_mask.mha", spine.mask)
    where = ["overlay", str(tmp_path / "images"), "--masks", str(tmp_path)]
    assert main([*where, "--out", str(tmp_path / "qc.html")]) == 0
    page = Page(chromium, tmp_path / "qc.html")
    image = "document.querySelector('#picture image')"
    size = page.run(f"const box = {image}.getBoundingClientRect(); return [box.height, box.width]")
    size_mm = np.array(spine.scan.voxels.shape[:2]) * spine.scan.spacing_mm[:2]
    assert size[0] / size[1] == pytest.approx(size_mm[0] / size_mm[1], rel=1e-3)
    assert size[0] > 500
    corner = page.corner("L4", 0)
    page.find("picture").send_keys("b")
    while page.run("return current().bodies[state.body].name") != "L4":
        page.active("b")
    page.active(DOWN, RIGHT)
    moved = np.subtract(page.save()["a_t2"]["L4"]["corners_mm"][0], (spine.scan.affine @ [*corner, 1])[:3])
    np.testing.assert_allclose(moved, [0, 2.46, -0.35], atol=1e-3)  # a pixel back, a pixel down


def test_ticks_are_remembered_without_names(chromium, root):
    page = Page(chromium, root / "qc.html")
    page.find("picture").send_keys("l")
    page.choose("show", "open")
    assert page.find("count").text == "2 of 3 scans; 1 looked at, 0 changed"
    stored = page.run("return JSON.stringify(Object.entries(localStorage))")
    assert "[1,0,0]" in stored
    assert "_t2" not in stored
    page = Page(chromium, root / "qc.html")
    assert page.run("return scans.map((scan) => scan.looked)") == [True, False, False]
    page.find("looked").click()


@pytest.mark.parametrize("storage", ["throw new Error('not allowed')", "return null"])
def test_it_works_where_nothing_can_be_remembered(chromium, root, storage):
    """A sandboxed page has no storage, and a file has none in some browsers (Qodana, issue 27; goaccess, issue 511)."""
    source = f"Object.defineProperty(window, 'localStorage', {{ get() {{ {storage} }} }})"
    script = chromium.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": source})
    try:
        page = Page(chromium, root / "qc.html")
        page.find("looked").click()
        assert "1 looked at" in page.find("count").text
        assert page.console() == []
    finally:
        chromium.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", script)


def test_the_doubtful_the_failed_and_the_changed_are_listed(page):
    for show, expected in (("failed", ["c_t2"]), ("doubtful", []), ("changed", []), ("", ["c_t2", "a_t2", "b_t2"])):
        page.choose("show", show)
        listed = [line.text.split("\n")[0] for line in page.driver.find_elements("css selector", "#list .scan")]
        assert listed == expected
    page.press("list", DOWN, DOWN)
    assert page.run("return current().key") == "b_t2"
    assert page.find("list").get_attribute("aria-activedescendant") == "scan-2"


def test_a_hostile_name_does_no_harm_and_is_saved_as_it_is(chromium, root, tmp_path):
    (tmp_path / "images" / "<").mkdir(parents=True)
    write_nifti(tmp_path / "images" / "<" / f"{HOSTILE.removeprefix('</')}.nii.gz", SPINE.scan)
    corners = corner_file(tmp_path / "in.json", {HOSTILE: BODIES})
    reading = [str(tmp_path / "images"), "--patients-by", "folder", "--weighting", "any"]
    assert main(["overlay", *reading, "--corners", str(corners), "--out", str(tmp_path / "qc.html")]) == 0
    page = Page(chromium, tmp_path / "qc.html")
    assert page.find("scan-name").text == HOSTILE
    assert page.driver.find_elements("id", "hit") == []
    page.find("picture").send_keys("c", DOWN, UP)
    assert page.save().keys() == {HOSTILE}
    out = str(tmp_path / "discs")
    assert main(["scans", *reading, "--corners", str(page.saved), "--out", out]) == 0
    assert page.console() == []


# The page itself -----------------------------------------------------------------------------------------------------


def test_it_makes_no_request_and_its_policy_blocks_other_scripts(page, root):
    page.open_scan("b_t2")
    page.find("picture").send_keys("c", DOWN, ESCAPE, LEFT, "+", "0")
    page.save()
    assert {url for url in page.requests() if not url.startswith("blob:")} <= {
        (root / "qc.html").as_uri(),
        "about:blank",
    }
    assert page.console() == []
    page.run('window.hit = 0; const s = document.createElement("script"); s.text = "hit = 1"; document.body.append(s);')
    assert page.run("return hit") == 0
    page.run('const i = new Image(); i.onerror = () => { hit = 2 }; i.src = "http://127.0.0.1:9/x.png";')
    page.wait_until("return hit === 2")


def test_slices_and_zoom(page):
    page.open_scan("b_t2")
    picture = "return document.querySelector('#picture image').getAttribute('href')"
    before = page.run(picture)
    page.press("picture", LEFT, LEFT)
    assert page.run(picture) != before
    assert page.find("where").text == "slice 5 of 13, 8 mm to the right"
    page.click(SPINE.corners["L4"].mean(0))
    assert page.run("return [state.body, state.corner]") == [NAMES.index("L4"), None]
    page.click((1, 1))
    assert page.run("return state.body") is None
    width = page.run("return state.view.width")
    page.press("picture", "+", "+")
    assert page.run("return state.view.width") == pytest.approx(width / 2.25)
    page.drag(SPINE.corners["L3"].mean(0) + 30, SPINE.corners["L3"].mean(0) + 40)  # the background moves the view
    page.find("picture").send_keys("0")
    assert page.run("return state.view.width") == pytest.approx(width)
    corner = page.corner("L3", 0)[:2]
    page.find("in").click()
    page.drag(corner, np.add(corner, 3))
    np.testing.assert_allclose(page.corner("L3", 0)[:2], np.add(corner, 3), atol=0.02)


def test_every_control_has_a_name_and_tab_reaches_it(page):
    unnamed = page.run(
        """return [...document.querySelectorAll("select, input, button, [role=listbox], [role=button], [tabindex]")]
            .filter((e) => !(e.getAttribute("aria-label") || e.textContent.trim() || (e.labels && e.labels.length)))
            .map((e) => e.outerHTML)"""
    )
    assert unnamed == []
    seen = []
    page.open_scan("b_t2")
    page.run("document.activeElement.blur()")
    for _ in range(60):
        page.tab()
        seen.append(page.run("return document.activeElement.id"))
        if seen[-1] == "looked":
            break
    wanted = ["save", "load", "show", "list", "previous", "next", "picture", "slice", "out", "fit", "in", "drawn"]
    wanted += ["up", "down", "new-name", "new-corners", "add", "looked"]
    assert [name for name in seen if name] == wanted


@pytest.mark.parametrize("width", [1366, 390])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_fits_its_width_in_both_themes(chromium, root, width, theme):
    page = Page(chromium, root / "qc.html", width=width, theme=theme)
    assert page.run("return document.documentElement.scrollWidth") <= width
    shade = page.run("return getComputedStyle(document.documentElement).backgroundColor")
    assert (sum(map(int, shade[4:-1].split(","))) > 380) == (theme == "light")
