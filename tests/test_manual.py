"""The manual builds without a warning, and who types what its tutorials say gets what they promise.

The pages' commands and Python run in their order, in a folder that looks like a clone. `SHORTER` says where a test
takes fewer patients, epochs, tasks or views. What is not run (`not_run`) is parsed by the commands' own parsers in
`test_docs`.
"""

import csv
import json
import os
import re
import shlex
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

import data_prep.__main__
import spinejax
from data_prep.anatomy.vertebrae import bodies_from_spider_mask
from data_prep.read.metaimage import read_mha
from spinejax.training import shipped

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
SHORTER = (
    (r"--patients \d+", "--patients 4"),
    (r"(train.py finetune .*)", r"\1 --epochs 1 --batch-size 8 --tasks pfirrmann narrowing"),
    (r"(train.py quickstart .*) --batch-size 32", r"\1 --epochs 1 --width 0.02 --batch-size 8"),
    (r"(evaluate.py .*--hotspots.*)", r"\1 --hotspot.num-views 1"),
    (r"seed=seed\)", "seed=seed, method=spinejax.Method(num_views=4))"),
    (r"key\(1\), 32\)", "key(1), 8)"),
)
DONE = "\nraise SystemExit(0)\n"  # of which a launcher's fork takes its status
ENVIRONMENT = r"(?:[A-Z_]+=\S+ )*"


def shorter(text):
    for long, short in SHORTER:
        text = re.sub(long, short, text)
    return text


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def lines(page):
    """The lines of a page's shell blocks, without comments."""
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield shlex.join(words) if "&" not in words else line


def not_run(line):
    """Why a line is not run here; None if it is."""
    for pattern, why in {
        r"(pip|\.) ": "this environment has what it installs",
        r"(gcloud|srun) ": "needs a cluster",
        r"export |.* --distributed( &)?$": "tests/parallel/test_processes.py starts several processes",
        r"make demo": "the fixture `clone` has run it",
        r"python evaluate.py --scan ": "it is what `make demo` runs",
        r"python .*runs/heads|python evaluate.py .* --split validation": "as the page's other network",
        r"python -m benchmarks\.": "minutes; tests/benchmarks/ runs them on less",
        r"python -m data_prep phantom --out runs/pointing-discs": "is for a benchmark",
        r"python train.py paper ": "a thousand epochs at full width",
    }.items():
        if re.match(pattern, line):
            return why
    return None


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

    def run(words, **environment):
        if words[:2] == ["-m", "data_prep"]:
            words = ["data_prep/__main__.py", *words[2:]]
        ended = launcher.run(words, folder=folder, **environment)
        assert ended.status == 0, (words, ended)
        return ended.stdout

    def follow(page, more=""):
        for line in map(shorter, lines(page)):
            if not not_run(line):
                variables, command = re.fullmatch(f"({ENVIRONMENT})python (.*)", line).groups()
                run(shlex.split(command), **dict(each.split("=", 1) for each in variables.split()))
        program = folder / f"{page.stem}.py"
        program.write_text(shorter("\n".join(blocks(page, "python"))) + more + DONE)
        return run([program])

    return follow


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
    temperatures = blocks(report, "python")[0].replace("runs/quickstart/run", "runs/mine")
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
    program.write_text("\n".join(blocks(ROOT / "README.md", "python")) + "\nprint(scores['narrowing'].shape)" + DONE)
    ended = launcher.run([program], folder=clone[0])
    assert (ended.status, ended.stdout) == (0, "(1, 2)\n"), ended


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
    ended = launcher.run([program], folder=tmp_path)
    assert ended.status == 0, ended


# Commands on scans ---------------------------------------------------------------------------------------------------


def write_scans(folder, *, num_patients):
    """Phantoms in the folders and files that the pages name: scans/, MASKS/, corners.json and so on."""
    made = ["phantom", "--as", "scans", "--patients", str(num_patients), "--out", str(folder / "SPIDER")]
    assert data_prep.__main__.main(made) == 0
    (folder / "scans").symlink_to("SPIDER/images")
    (folder / "MASKS").symlink_to("SPIDER/masks")
    (folder / "grades.csv").symlink_to("SPIDER/labels.csv")
    scans = {}
    for path in sorted((folder / "MASKS").iterdir()):
        mask = read_mha(path, np.uint8)
        scans[path.stem] = {
            body.name: {"corners_mm": in_patient_space(mask, body), "width_mm": 36}
            for body in bodies_from_spider_mask(mask)[0]
        }
    (folder / "corners.json").write_text(json.dumps({"scans": scans}))


def in_patient_space(mask, body):
    voxels = np.c_[body.corners, np.full(4, body.mid_slice), np.ones(4)]
    return [None if np.isnan(point).any() else point[:3].tolist() for point in voxels @ mask.affine.T]
