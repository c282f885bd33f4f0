"""The pages on which corners are corrected: what is in them. test_corner_page_browser uses them."""

import base64
import io
import json
import os
import re
import stat

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from data_prep.__main__ import main
from data_prep.anatomy.corner_file import bodies_from_corners
from data_prep.anatomy.vertebrae import VertebralBody, bodies_from_spider_mask
from data_prep.dataset.job import Job, Located
from data_prep.look.corner_page import body_facts, corner_pages, doubt, slices_to_show
from data_prep.read.found import Found, LeftOut, Series
from data_prep.read.metaimage import write_mha
from data_prep.read.nifti import write_nifti
from data_prep.read.scan import NotSagittalError, Scan
from spinejax.errors import SpinejaxError
from tests.block_spine import block_spine, sagittal_affine
from tests.data_prep.sources.test_scan_files import write_set

SPINE = block_spine(spacing_mm=(1.1, 0.7, 4.0), angles_deg=(6.0, -4.0))  # oblique, with oblong pixels
BODIES = bodies_from_spider_mask(SPINE.mask)[0]


def facts_of(text):
    return json.loads(re.search(r'id="facts">(.*?)</script>', text, re.S)[1])


def pictures_of(text, number):
    """A scan's pictures, as floats in [0, 1]."""
    lines = re.search(rf'id="slices-{number}">(.*?)</script>', text, re.S)[1].split()
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(line))).convert("L")) / 255 for line in lines]


def page_of(tmp_path, located, *, found=None, out="page.html", **options):
    """Pages of scans that are located like this: each a name and what `locate` gives or raises."""

    def job(name, result):
        def locate():
            if isinstance(result, Exception):
                raise result
            return result

        return Job(name, "", "", "train", {}, locate)

    def read():
        return SPINE.scan, []

    found = found or Found()
    found.series = [Series(f"{name}.mha", name, name, (), read) for name in located]
    jobs = [job(f"{name}.mha", result) for name, result in located.items()]
    options = {"scans_per_page": 100, "console": Console(quiet=True)} | options
    return corner_pages(jobs, found, tmp_path / out, **options)


def located(*, confidence=None, notes=(), doubtful=False):
    return Located(SPINE.scan, BODIES, notes, confidence=confidence, doubtful_levels=doubtful)


def test_the_doubtful_come_first(tmp_path):
    sure = {body.name: 0.9 for body in BODIES}
    found = Found(failed=[LeftOut("odd.dcm", "odd.dcm: two patients.")], left_out=[LeftOut("x<b>", "axial")])
    scans = {
        "fine": located(confidence=sure),
        "noted": located(confidence=sure, notes=["noted.mha: L1 was left out: why."]),
        "low": located(confidence=sure | {"L3": 0.4}),
        "lower": located(confidence=sure | {"L3": 0.2}),
        "levels": located(confidence=sure, doubtful=True),
        "bodiless": SpinejaxError("bodiless.mha: no mask."),
        "axial": NotSagittalError("axial.mha: an axial series."),
    }
    pages, counts = page_of(tmp_path, scans, found=found)
    text = pages[0].read_text()
    facts = facts_of(text)
    order = ["levels", "lower", "low", "noted", "fine"]
    assert [scan["key"] or scan["name"] for scan in facts["scans"]] == ["bodiless", "odd.dcm", *order]
    assert [scan["doubt"] for scan in facts["scans"]] == [0, 0, 1, 2, 2, 3, 4]
    assert counts == {"failed": 2, "doubtful levels": 1, "low confidence": 2, "noted": 1, "no doubt": 1}
    assert facts["scans"][0]["failure"] == "no mask."  # without the name, which is beside it
    assert len(pictures_of(text, 0)) == 13  # its corners can be marked
    assert facts["scans"][1]["slices"] == []
    assert facts["scans"][5]["notes"] == ["L1 was left out: why."]
    assert "2 left out" in text
    assert "<li>x&lt;b&gt;: axial</li>" in text
    assert "an axial series." in text


def test_a_scan_without_any_disc_failed_and_keeps_its_bodies(tmp_path):
    scans = {"apart": Located(SPINE.scan, [BODIES[0], BODIES[-1]]), "one": Located(SPINE.scan, BODIES[:2])}
    far = VertebralBody(BODIES[1].name, BODIES[1].corners * 9, BODIES[1].slices)
    scans["far"] = Located(SPINE.scan, [BODIES[0], far])
    facts = facts_of(page_of(tmp_path, scans)[0][0].read_text())
    assert [(scan["key"], len(scan["bodies"])) for scan in facts["scans"]] == [("far", 2), ("apart", 2), ("one", 2)]
    assert "its corners span" in facts["scans"][0]["failure"]


def test_pictures_are_neither_turned_nor_mirrored(tmp_path):
    voxels = SPINE.scan.voxels * np.linspace(1, 2, SPINE.scan.voxels.shape[2])
    scan = Scan(voxels, SPINE.scan.affine, "")
    text = page_of(tmp_path, {"a": Located(scan, BODIES)})[0][0].read_text()
    [facts] = facts_of(text)["scans"]
    black, white = np.percentile(voxels, [0.5, 99.7])
    assert facts["slices"] == list(range(13))
    for index, picture in zip(facts["slices"], pictures_of(text, 0), strict=True):
        expected = ((voxels[:, :, index] - black) / (white - black)).clip(0, 1)
        assert picture.shape == expected.shape
        assert np.abs(picture - expected).mean() < 0.02
    np.testing.assert_allclose(facts["affine"], scan.affine)
    for body, shown in zip(BODIES, facts["bodies"], strict=True):
        known = np.isfinite(body.corners).all(1)
        assert [corner is not None for corner in shown["corners"]] == known.tolist()
        points = np.array([corner for corner in shown["corners"] if corner])
        np.testing.assert_allclose(points, np.c_[body.corners[known], np.full(known.sum(), body.mid_slice)])


@pytest.mark.parametrize(
    ("num_slices", "spacing_mm", "middle", "expected"),
    [
        (1, 4.0, 0, [0]),
        (9, 4.0, 4, list(range(9))),
        (40, 4.0, 20, list(range(13, 28))),
        (150, 0.9, 75, list(range(45, 106, 5))),  # every fifth
        (20, 4.0, 1, list(range(9))),
    ],
)
def test_slices_about_the_middle_are_shown(num_slices, spacing_mm, middle, expected):
    scan = Scan(np.zeros((3, 3, num_slices), np.float32), sagittal_affine((1.0, 1.0, spacing_mm)), "")
    shown = slices_to_show(scan, middle)
    assert middle in shown
    assert len(shown) <= 15
    assert shown == expected


def test_an_empty_image_has_a_picture(tmp_path):
    scan = Scan(np.full((9, 9, 2), 3, np.float32), SPINE.scan.affine, "")
    found = Found()
    found.series = [Series("a", "a", "a", (), lambda: (scan, []))]

    def fail():
        raise OSError(5, "read error")

    jobs = [Job("a", "", "", "train", {}, fail)]
    pages, _ = corner_pages(jobs, found, tmp_path, scans_per_page=1, console=Console(quiet=True))
    [facts] = facts_of(pages[0].read_text())["scans"]
    assert "cannot be read" in facts["failure"]
    assert facts["slices"] == [0, 1]


def test_pages_hold_so_many_scans_and_link_to_one_another(tmp_path):
    scans = {f"s{number}": located() for number in range(5)}
    pages, _ = page_of(tmp_path, scans, out="qc.html", scans_per_page=2)
    assert [page.name for page in pages] == ["qc.html", "qc-002.html", "qc-003.html"]
    keys = [[scan["key"] for scan in facts_of(page.read_text())["scans"]] for page in pages]
    assert keys == [["s0", "s1"], ["s2", "s3"], ["s4"]]
    for page in pages:
        text = page.read_text()
        assert all(f'href="{other.name}"' in text for other in pages)
        assert stat.S_IMODE(os.stat(page).st_mode) == 0o600  # it shows patients
    (tmp_path / "qc-009.html").write_text("the user's own")
    pages, _ = page_of(tmp_path, scans, out="qc.html", scans_per_page=3, num_scans=4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["qc-002.html", "qc-009.html", "qc.html"]
    assert [len(facts_of(page.read_text())["scans"]) for page in pages] == [3, 1]


@pytest.mark.parametrize("confidence", [None, 0.2])
def test_bodies_of_masks_have_no_confidence_and_raise_no_doubt(confidence):
    facts = {"failure": "", "notes": [], "doubtfulLevels": False, "bodies": [{"confidence": confidence}]}
    assert doubt(facts) == ((4, 1.0) if confidence is None else (2, 0.2))


def test_the_policy_allows_the_one_script_and_style(tmp_path):
    text = page_of(tmp_path, {"a": located()})[0][0].read_text()
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', text)[1]
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy
    markup = re.sub(r"<(script|style)\b.*?</\1>", "", text, flags=re.S)
    assert not re.search(r"\son\w+=|\sstyle=|javascript:", markup)
    assert "http://" not in text
    assert "https://" not in text


def test_the_command_writes_pages_to_a_file_or_a_folder(tmp_path, capsys):
    root = write_set(tmp_path)
    (root / "masks" / "b_t2.mha").unlink()
    where = ["overlay", str(root / "images"), "--masks", str(root / "masks")]
    assert main([*where, "--out", str(tmp_path / "new" / "qc.html")]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == str(tmp_path / "new" / "qc.html")
    assert printed[1] == "3 scans: 1 failed, 0 doubtful levels, 0 low confidence, 0 noted, 2 no doubt"
    assert main([*where, "--out", str(tmp_path / "pages"), "--workers", "2"]) == 0
    assert facts_of((tmp_path / "pages" / "index.html").read_text())["scans"][0]["key"] == "b_t2"
    for option, value in (("--scans-per-page", "0"), ("--scans", "0"), ("--workers", "0")):
        assert main([*where, "--out", str(tmp_path / "qc.html"), option, value]) == 2
        assert f"{option} 0: expected 1 or more" in capsys.readouterr().err
    assert main([*where, "--out", str(root / "images" / "a_t2.mha" / "x.html")]) == 2
    assert "no folder can be made there" in capsys.readouterr().err


def test_a_name_that_is_no_utf8_and_one_of_markup(tmp_path):
    """Latin-1 file names come from old archives."""
    folder = tmp_path / "images" / "<"
    folder.mkdir(parents=True)
    write_nifti(folder / 'script><b id="hit">\u00e9_t2.nii.gz', SPINE.scan)
    latin = os.fsdecode(b"M\xfcller_t2.mha")
    write_mha(tmp_path / "m.mha", SPINE.scan)
    (tmp_path / "images" / "b").mkdir()
    (tmp_path / "m.mha").rename(tmp_path / "images" / "b" / latin)
    corners = tmp_path / "corners.json"
    corners.write_text('{"scans": {}}')
    where = ["overlay", str(tmp_path / "images"), "--corners", str(corners), "--patients-by", "folder"]
    assert main([*where, "--out", str(tmp_path / "qc.html")]) == 0
    text = (tmp_path / "qc.html").read_text()
    assert {scan["key"] for scan in facts_of(text)["scans"]} == {
        '</script><b id="hit">\u00e9_t2',
        "b/M\u00fcller_t2",
    }
    assert '<b id="hit">' not in text


@pytest.mark.parametrize("slice_mm", [0.9, 2.0, 4.4, 6.0])
def test_a_body_has_its_corners_and_slices_again_from_what_is_saved(slice_mm):
    scan = Scan(np.zeros((250, 250, 24), np.float32), sagittal_affine((1.1, 0.7, slice_mm), (6.0, -4.0)), "")
    ranges = [(first, stop) for first in range(24) for stop in range(first + 1, 25)]
    for slices in ranges:
        if 5 <= (slices[1] - slices[0]) * slice_mm <= 100:  # the widths that a corner file may have
            body = VertebralBody("L4", SPINE.corners["L4"], slices)
            shown = body_facts(body, scan, None)
            points = [(scan.affine @ [*corner, 1])[:3].round(4).tolist() for corner in shown["corners"]]
            entry = {"corners_mm": points, "width_mm": shown["widthMm"]}
            again = bodies_from_corners(scan, {"L4": entry, "L5": entry})[0]  # a disc needs two
            assert again.slices == slices
            np.testing.assert_allclose(again.corners, body.corners, atol=1e-3)


def test_the_scans_that_an_inventory_chose_are_shown(tmp_path):
    root = write_set(tmp_path)
    table = tmp_path / "inventory.csv"
    assert main(["inventory", str(root / "images"), "--out", str(table)]) == 0
    lines = table.read_text().splitlines(keepends=True)
    kept = [re.sub("(^|,)yes(,|$)", r"\1no\2", line) if "b_t2" in line else line for line in lines]
    assert kept != lines
    table.write_text("".join(kept))
    where = ["overlay", str(root / "images"), "--masks", str(root / "masks"), "--inventory", str(table)]
    assert main([*where, "--out", str(tmp_path / "qc.html")]) == 0
    assert [scan["key"] for scan in facts_of((tmp_path / "qc.html").read_text())["scans"]] == ["a_t2", "c_t2"]
