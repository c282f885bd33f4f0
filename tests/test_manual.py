"""The manual builds without a warning, and who types what its tutorials say gets what they promise.

Each page's commands and Python run in their order: those of the tutorials in a folder that looks like a clone, those
of a how-to page in one that has what the page names, such as `scans/` or `RUN`. `tests.manual` has what is shortened,
and what is not run and why.
"""

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zlib

import numpy as np
import pydicom
import pytest

import data_prep.__main__
import spinejax
from data_prep.anatomy.vertebrae import bodies_from_spider_mask
from data_prep.read.metaimage import read_mha
from spinejax.training import shipped
from tests import dicom_files
from tests.data_prep.sources.test_pooled import write_sudirman
from tests.manual import DOCS, NOT_RUN, PAGES, ROOT, blocks, lines, not_run, shorter

DONE = "\nraise SystemExit(0)\n"  # of which a launcher's fork takes its status
# Most of the time goes into compiling programs that run once.
QUICKLY_COMPILED = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
ENVIRONMENT = r"(?:[A-Z_]+=\S+ )*"
HOW_TO = [page for page in PAGES if page.parent.name != "tutorials" and any(not not_run(line) for line in lines(page))]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A folder like a clone in which `make demo` has run, and what it printed."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("Makefile", "evaluate.py", "train.py", "examples"):
        (folder / name).symlink_to(ROOT / name)
    # `.venv/installed` counts as made: this environment has all that it would install.
    demo = ["make", "--old-file=.venv/installed", f"BIN={sys.prefix}/bin", "demo"]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    ended = subprocess.run(demo, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return folder, ended.stdout


@pytest.fixture
def follow(launcher, clone):
    """Runs a page's commands, then its Python and `more`, in the clone; returns what the Python printed."""
    folder, _ = clone

    def follow(page, more=""):
        for line in lines(page):
            if not not_run(line):
                run(launcher, folder, line)
        program = folder / f"{page.stem}.py"
        program.write_text(shorter("\n".join(blocks(page, "python"))) + more + DONE)
        return start(launcher, folder, [program])

    return follow


def run(launcher, folder, line):
    """Run a line of a page, shortened."""
    variables, command = re.fullmatch(f"({ENVIRONMENT})python (.*)", shorter(line)).groups()
    words = shlex.split(command)
    if words[:2] == ["-m", "data_prep"]:
        words = [ROOT / "data_prep" / "__main__.py", *words[2:]]
    start(launcher, folder, words, **dict(each.split("=", 1) for each in variables.split()))


def start(launcher, folder, words, XLA_FLAGS="", **environment):
    """Run Python in a folder; returns what it printed."""
    ended = launcher.run(words, folder=folder, XLA_FLAGS=f"{XLA_FLAGS} {QUICKLY_COMPILED}", **environment)
    assert ended.status == 0, (words, ended)
    return ended.stdout


# The pages -----------------------------------------------------------------------------------------------------------


def test_it_builds_without_a_warning_and_explains_every_public_name(tmp_path):
    """Strict: a link to a page, a heading or a name of the code that is not there ends the build."""
    pytest.importorskip("mkdocs", reason="the extra `docs` is not installed")
    pytest.importorskip("mkdocstrings", reason="the extra `docs` is not installed")
    build = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    ended = subprocess.run(build, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
    head, names = (tmp_path / "objects.inv").read_bytes().split(b"zlib.\n")
    assert b"# Project: spinejax" in head
    explained = {line.split()[0] for line in zlib.decompress(names).decode().splitlines()}
    for name in spinejax.__all__:
        module = getattr(getattr(spinejax, name), "__module__", None)
        places = {f"{module}.{name}", f"spinejax.tasks.{name}", f"spinejax.network.{name}"}
        assert places & explained, name
    assert (
        "&gt;&gt;&gt;" in (tmp_path / "reference" / "spinejax.html").read_text()
    )  # examples as code, not as quotations
    page = (tmp_path / "explanation" / "paper.html").read_text()
    assert 'href="../reference/network.html#spinejax.network.views.put_back"' in page


def test_grade_my_first_scan(clone, follow):
    folder, printed = clone
    assert "The page is runs/demo/report/index.html." in printed
    out = folder / "runs" / "demo" / "evaluation"
    with open(out / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["level"] for row in rows] == ["T11-T12", "T12-L1", "L1-L2", "L2-L3", "L3-L4", "L4-L5", "L5-S1"]
    network = json.loads((out / "results.json").read_text())["network"]
    assert network["weights"] == shipped.about()["sha256"]
    tasks = shipped.about()["record"]["tasks"]
    assert len(list((out / "hotspots" / "nifti").iterdir())) == len(rows) * len(tasks)
    html = (folder / "runs" / "demo" / "report" / "index.html").read_text()
    assert f"maps-{len(rows) - 1}" in html
    assert "Research use only" in html

    page = DOCS / "tutorials" / "first-scan.md"
    behind = (ROOT / "Makefile").read_text().split("rm -rf runs/demo\n\t$(BIN)/")[1].split("\n\n")[0]
    assert " ".join(behind.replace("\\\n", "").split()) in page.read_text()
    write_scans(folder, num_patients=1)
    assert follow(page) == blocks(page, "text")[0]  # the table that the page shows
    assert (folder / "review.html").is_file()
    assert (folder / "report" / "index.html").is_file()  # of scans without labels, by corners


def test_train_on_my_own_labels(clone, follow):
    folder, _ = clone
    report = DOCS / "report.md"  # its code reads the temperatures that this tutorial's `--calibrate` has stored
    temperatures = "\n".join(blocks(report, "python")).replace("runs/quickstart/run", "runs/mine")
    temperatures = temperatures.replace("at_temperature(probabilities,", 'at_temperature(probabilities["pfirrmann"],')
    printed = follow(DOCS / "tutorials" / "own-labels.md", temperatures + "\nprint(probabilities.sum(1).round(5))")
    assert re.search(r"'pfirrmann': array\(\[\d", printed)
    assert "[1. 1. 1. 1. 1. 1.]" in printed
    labels = (folder / "mine" / "labels.csv").read_text()
    assert labels.startswith(blocks(DOCS / "tutorials" / "own-labels.md", "csv")[0])
    assert (folder / "sheet.png").is_file()


def test_a_hotspot_i_can_trust(follow):
    """The page promises that its questions tell the network's map from one of shuffled weights, and from chance."""
    printed = follow(DOCS / "tutorials" / "trusted-hotspot.md")
    seeds, shuffled = (float(re.search(rf"{name}: (\S+)", printed)[1]) for name in ("two seeds", "shuffled weights"))
    assert seeds > shuffled + 0.1
    as_it_is, hottest, others = map(float, re.findall(r"(?:is|covered) (0\.\d+)", printed))
    assert as_it_is - hottest > 3 * abs(as_it_is - others)


def test_a_pod(clone, follow):
    follow(DOCS / "tutorials" / "pod.md")
    assert (clone[0] / "runs" / "four" / "export" / "variables").is_dir()


def test_the_readmes_python_runs(clone, launcher):
    program = clone[0] / "readme.py"
    program.write_text(
        shorter("\n".join(blocks(ROOT / "README.md", "python"))) + "\nprint(scores['narrowing'].shape)" + DONE
    )
    assert start(launcher, clone[0], [program]) == "(1, 2)\n"


@pytest.mark.parametrize(
    "page",
    [page for page in sorted(DOCS.rglob("*.md")) if blocks(page, "python") and page.parent.name != "tutorials"],
    ids=lambda page: page.stem,
)
def test_the_python_of_other_pages_runs(page, launcher, tmp_path):
    elsewhere = {"jax": "tests/commands/test_evaluate.py", "report": "test_train_on_my_own_labels"}
    if page.stem in elsewhere:
        return
    program = tmp_path / "program.py"
    program.write_text(shorter("\n".join(blocks(page, "python"))) + DONE)
    start(launcher, tmp_path, [program])


# The commands of how-to pages ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", HOW_TO, ids=lambda page: page.stem)
def test_the_commands_of_other_pages_run(page, launcher, material, tmp_path):
    for each in material.iterdir():
        (tmp_path / each.name).symlink_to(each)
    discs = tmp_path / "discs"
    discs.symlink_to("DIR")
    for line in lines(page):
        if not not_run(line):
            if " --out discs " in f"{line} ":  # a page shows several ways to make them
                discs.unlink() if discs.is_symlink() else shutil.rmtree(discs)
            run(launcher, tmp_path, line)


def test_what_is_not_run_is_in_the_pages():
    every = [line for page in PAGES for line in lines(page)]
    assert not [pattern for pattern in NOT_RUN if not any(re.match(pattern, line) for line in every)]


@pytest.fixture(scope="module")
def material(launcher, tmp_path_factory):
    """What the how-to pages name: scans in several forms, a run, a data set and an evaluation, all small."""
    folder = tmp_path_factory.mktemp("material")
    for name in ("train.py", "evaluate.py"):
        (folder / name).symlink_to(ROOT / name)
    write_scans(folder, num_patients=3)
    phantom = ["phantom", "--as", "scans", "--format", "dicom", "--patients", "1", "--seed", "3"]
    assert data_prep.__main__.main([*phantom, "--out", str(folder / "exported")]) == 0
    (folder / "EXPORT").symlink_to("exported/images")
    slices = [pydicom.dcmread(path) for path in sorted((folder / "EXPORT").glob("*/*"))]
    dicom_files.save(dicom_files.enhanced(slices), folder / "IM0001")
    for mask in (folder / "exported" / "masks").iterdir():
        shutil.copy(mask, folder / "MASKS")
    (folder / "SCAN").mkdir()
    shutil.copy(folder / "scans" / "p00000_t2.mha", folder / "SCAN")
    for series in ("t2_SPACE", "t1"):  # without a mask
        shutil.copy(folder / "scans" / "p00001_t2.mha", folder / "SPIDER" / "images" / f"p00001_{series}.mha")
    write_stacks(folder / "SPIDER_MINI", folder / "SPIDER")
    boxes = [(f"{number}_t2", "Lumbar Disc Bulge (LDB)", "L5-S1", 200, 240) for number in (4, 5)]
    sudirman = write_sudirman(folder / "SUDIRMAN", boxes)
    for number in (4, 5):
        shutil.copy(folder / "scans" / f"p0000{number - 3}_t2.mha", sudirman / "images" / f"{number}_t2.mha")
    for line in (
        "python -m data_prep spider SPIDER --out DIR",
        "python train.py quickstart --data DIR --workdir RUN",
        "python evaluate.py --checkpoint RUN --scan EXPORT/ --masks MASKS/ --key discs.key --hotspots --out EVALUATION",
    ):
        run(launcher, folder, line)
    for name in ("A", "B"):
        (folder / name).symlink_to("EVALUATION")
    return folder


# Commands on scans ---------------------------------------------------------------------------------------------------


def write_scans(folder, *, num_patients):
    """Phantoms in the folders and files that the pages name: scans/, MASKS/, corners.json and so on."""
    made = ["phantom", "--as", "scans", "--patients", str(num_patients), "--out", str(folder / "SPIDER")]
    assert data_prep.__main__.main(made) == 0
    shutil.copytree(folder / "SPIDER" / "images", folder / "scans")
    shutil.copytree(folder / "SPIDER" / "masks", folder / "MASKS")
    (folder / "grades.csv").symlink_to("SPIDER/labels.csv")
    scans = {}
    for path in sorted((folder / "MASKS").iterdir()):
        mask = read_mha(path, np.uint8)
        scans[path.stem] = {
            body.name: {"corners_mm": in_patient_space(mask, body), "width_mm": 36}
            for body in bodies_from_spider_mask(mask)[0]
        }
    (folder / "corners.json").write_text(json.dumps({"scans": scans}))


def write_stacks(folder, spider):
    """The T2 scans of a folder like SPIDER's as T2 SPACE stacks."""
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
        for path in (spider / kind).glob("*_t2.mha"):
            shutil.copy(path, folder / kind / path.name.replace("_t2", "_t2_SPACE"))
    shutil.copy(spider / "radiological_gradings.csv", folder)
    overview = (spider / "overview.csv").read_text()
    (folder / "overview.csv").write_text(overview.replace("_t2", "_t2_SPACE"))


def in_patient_space(mask, body):
    voxels = np.c_[body.corners, np.full(4, body.mid_slice), np.ones(4)]
    return [None if np.isnan(point).any() else point[:3].tolist() for point in voxels @ mask.affine.T]
