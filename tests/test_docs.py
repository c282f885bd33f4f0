"""What the README and the docs name is there, and the commands they show are understood."""

import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import data_prep.__main__

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
CURRENT = [page for page in PAGES if page.name != "CHANGELOG.md"]  # which names what was, too
BEFORE = r"(?:    |)(?:taskset -c 0 |[A-Z_]+=\S+ )*"  # a command


def commands(page):
    """The project's commands in a page's blocks of code, as lists of words."""
    text = page.read_text().replace("\\\n", " ")
    for line in re.findall(rf"^{BEFORE}(python .+?)(?: &)?$", text, re.MULTILINE):
        words = shlex.split(line, comments=True)
        if not re.search(r"[\[…|]", " ".join(words)):  # a synopsis
            yield words[1:]


COMMANDS = [
    pytest.param(words, id=f"{page.stem}: {' '.join(words)[:60]}") for page in CURRENT for words in commands(page)
]
PARSED = """
import json, sys
from spinejax.commands import evaluate, train
evaluate.main = train.main = lambda arguments: None
for words in json.load(sys.stdin):
    sys.argv = words
    try:
        {"train.py": train, "evaluate.py": evaluate}[words[0]].cli()
    except SystemExit as ended:
        if ended.code:
            sys.exit(f"not understood: {words}")
"""


@pytest.mark.parametrize("words", [each for each in COMMANDS if each.values[0][0] == "-m"])
def test_commands_are_understood(words, monkeypatch):
    monkeypatch.setattr(data_prep.__main__, "status_of", lambda run: 0)
    if words[1] == "data_prep":
        assert data_prep.__main__.main(words[2:]) == 0
    else:
        assert (ROOT / f"{words[1].replace('.', '/')}.py").is_file(), words


def test_training_and_grading_commands_are_understood():
    scripts = [each.values[0] for each in COMMANDS if each.values[0][0] != "-m"]
    assert scripts
    child = [sys.executable, "-c", PARSED]
    run = subprocess.run(child, input=json.dumps(scripts), capture_output=True, text=True, cwd=ROOT, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("page", CURRENT, ids=lambda page: page.name)
def test_files_and_modules_that_are_named_exist(page):
    text = page.read_text()
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert not [link for link in links if link and not (page.parent / link).exists()]
    files = re.findall(r"`((?:spinejax|data_prep|benchmarks|tests|docs)/[\w/.-]*\.\w+)", text)
    assert not [file for file in files if not (ROOT / file).exists()]
    for name in re.findall(r"`((?:spinejax|data_prep|benchmarks)(?:\.\w+)+)", text):
        assert is_there(name), name
    for name in re.findall(r"\]\[((?:spinejax|data_prep)[\w.]*)\]", text):  # of the manual's reference
        assert is_there(name), name
    for module, names in re.findall(r"^from ((?:spinejax|data_prep)[\w.]*) import (.+)$", text, re.MULTILINE):
        for name in names.split(","):
            assert is_there(f"{module}.{name.strip()}"), name


def test_the_readme_is_short_and_its_picture_light():
    """What else there is to say is in the manual."""
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) < 120
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)
    assert pictures == ["docs/images/spine.png"]
    assert (ROOT / pictures[0]).stat().st_size < 400_000


def is_there(name):
    """Whether a dotted name is a module, an attribute of one, or a field of a class."""
    found = importlib.import_module(name.split(".")[0])
    for place, part in enumerate(name.split(".")[1:], start=2):
        if part in getattr(found, "__annotations__", {}) and not hasattr(found, part):
            return True
        try:
            found = getattr(found, part) if hasattr(found, part) else import_part(name, place)
        except ModuleNotFoundError:
            return False
    return True


def import_part(name, place):
    return importlib.import_module(".".join(name.split(".")[:place]))
