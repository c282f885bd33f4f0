"""What the README and the docs name is there, and the commands they show are understood."""

import importlib
import json
import re
import shlex
import subprocess
import sys

import pytest
import tyro

import data_prep.__main__
from data_prep.anatomy.corner_file import read_corners
from data_prep.sources.labels import read_labels, read_tasks
from tests.manual import DOCS, PAGES, ROOT, blocks

CURRENT = [page for page in PAGES if page.name != "CHANGELOG.md"]  # which names what was, too
BEFORE = r"(?:.*-- *command=.*&& *|srun \S+ |taskset -c 0 |[A-Z_]+=\S+ )*"  # a command


def commands(page):
    """The project's commands in a page's blocks of code, as lists of words."""
    text = page.read_text().replace("\\\n", " ")
    for line in re.findall(rf'^{BEFORE}(python .+?)"?(?: &)?$', text, re.MULTILINE):
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
        return
    try:
        benchmark = importlib.import_module(words[1])
    except SystemExit:
        pytest.skip("this benchmark's peers are not installed")
    if arguments := getattr(benchmark, "Arguments", None):
        tyro.cli(arguments, args=words[2:])
    else:
        monkeypatch.setattr("sys.argv", words[1:])
        getattr(benchmark, "arguments", lambda: None)()


def test_training_and_grading_commands_are_understood():
    scripts = [each.values[0] for each in COMMANDS if each.values[0][0] != "-m"]
    assert scripts
    child = [sys.executable, "-c", PARSED]
    run = subprocess.run(child, input=json.dumps(scripts), capture_output=True, text=True, cwd=ROOT, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_tables_of_the_pages_are_read(tmp_path):
    """Corners, tasks and labels of `docs/data.md` by the readers that it describes."""
    page, file = DOCS / "data.md", tmp_path / "file"
    corners, tasks = blocks(page, "json")
    file.write_text(corners)
    assert [*read_corners(file)["0007_t2"]] == ["L4", "L5", "S1"]
    file.write_text(tasks)
    pfirrmann, modic = read_tasks(file)
    assert (pfirrmann.num_grades, modic.name) == (5, "modic")
    (table,) = blocks(page, "csv")
    file.write_text(table)
    labels = {"L4-L5": {"pfirrmann": 3, "narrowing": 1}, "L5-S1": {"pfirrmann": 4}}
    assert read_labels(file, read_tasks(None)).rows == {("0007", "0007_t2"): labels}


def test_commands_are_in_blocks_that_tests_run():
    indented = re.compile(r"^    (?:python|make|taskset) ", re.MULTILINE)
    for page in CURRENT:
        outside = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        assert not indented.search(outside), page


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
