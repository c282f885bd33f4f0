"""The manual's pages as tests read them: their blocks, their commands, and what of them is shortened or not run."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))]

SHORTER = (
    (r" --workers 2", ""),
    (r"--fold 1/5", "--fold 1/3"),
    (r"(data_prep phantom .*)--patients \d+", r"\1--patients 3"),
    (r"(train.py finetune --data .*)", r"\1 --epochs 1 --batch-size 8 --tasks pfirrmann"),
    # One task, of the same grades in every data set: the commands share what is compiled.
    (
        r"(train.py (?:quickstart|paper|spider) .*)",
        r"\1 --epochs 1 --width 0.02 --batch-size 8 --tasks pfirrmann",
    ),
    (r"(evaluate.py .*--hotspots.*)", r"\1 --hotspot.num-views 1"),
    (r"evaluate.py --scan scans/(.* --niivue)", r"evaluate.py --checkpoint RUN --scan SCAN\1"),
    (r"seed=seed\)", "seed=seed, method=spinejax.Method(num_views=4))"),
    (r'(explain\(.*"pfirrmann": 4})\)', r"\1, method=spinejax.Method(num_views=1))"),
    (r"key\(1\), 32\)", "key(1), 8)"),
)
"""Where a test takes fewer patients, folds, epochs, tasks or views, or a narrower network."""

NOT_RUN = {
    r"(pip|\.|npm) ": "this environment has what it installs",
    r"(gcloud|srun) ": "needs a cluster",
    r"export |.* --distributed( &)?$": "tests/parallel/test_processes.py starts several processes",
    r"make (lint|test|docs)": "it is what runs this test, or test_it_builds_without_a_warning",
    r"\.venv/bin/python -m pytest ": "it is what runs this test",
    r"make demo": "the fixture `clone` has run it",
    r"python evaluate.py --scan (examples|scans)/.* --calibrate ": "it is what `make demo` runs, of other scans",
    r"python .*runs/heads|python evaluate.py .* --split validation": "as the page's other network",
    r"(taskset -c 0 )?python -m benchmarks\.": "minutes to hours; tests/benchmarks/ runs many of them on less",
    r"python -m data_prep phantom --out runs/(pointing-discs|phantoms)": "is for a benchmark",
    r"python -m data_prep (train-detector|detect-eval) ": "hours; tests/data_prep/detector/ runs it on less",
    r".* s3://": "needs a bucket; tests/commands/test_stores.py runs it on one of this machine",
    r".* (dicomweb|https?)://": "needs an archive; tests/commands/test_evaluate.py runs it on one of this machine",
    r"python train.py paper .*\[": "a synopsis",
}
"""Patterns of lines that are not run, and why. `test_docs` parses those that are Python commands."""


def blocks(page, language):
    """The page's blocks of code in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def lines(page):
    """The lines of a page's shell blocks, without comments; for `make quickstart` those of its recipe."""
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            if line == "make quickstart":
                yield from quickstart()
            elif words := shlex.split(line, comments=True):
                yield line.partition(" # ")[0].strip() if {"&", "&&"} & set(words) else shlex.join(words)


def quickstart():
    """The commands behind `make quickstart`."""
    recipe = (ROOT / "Makefile").read_text().split("rm -rf runs/quickstart\n")[1].split("\n\n")[0]
    for line in recipe.replace("\\\n", "").splitlines():
        yield " ".join(line.replace("$(BIN)/", "").split())


def shorter(text):
    for long, short in SHORTER:
        text = re.sub(long, short, text)
    return text


def not_run(line):
    """Why a line is not run; None if it is."""
    return next((why for pattern, why in NOT_RUN.items() if re.match(pattern, line)), None)
