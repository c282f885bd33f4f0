"""The plan of the house, held by a test: who may import whom, who may touch which library, what a public name needs."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Imports flow down this list only: a room may use the rooms above it.
ROOMS = (
    "errors",
    "processes",
    "tasks",
    "paper",
    "sink",
    "shards",
    "manifest",
    "dataset",
    "config",
    "winograd",
    "convolution",
    "model",
    "losses",
    "views",
    "metrics",
    "calibration",
    "graded",
    "pipeline",
    "devices",
    "device_cache",
    "layout",
    "training",
    "lock",
    "sums",
    "steps",
    "checkpoint",
    "temperatures",
    "predict",
    "hotspots",
    "pointing",
    "faithfulness",
    "map_files",
    "figures",
    "showing",
    "tables",
    "sprites",
    "report",
    "logbook",
)

# What data_prep may use of the library: the format, never the network.
SHARED = {"errors", "tasks", "paper", "shards", "manifest", "dataset"}

# Training the detector tells JAX first which CPU kernels and memory to use, as train.py does.
ALSO = {"data_prep/__main__.py": {"devices"}}

# The detector is the one place in data_prep with a network of its own; it is not the library's.
DETECTOR = "data_prep/detector"

# Libraries that only some files may import; a change of library is then a change of one file.
ONLY_IN = {
    "orbax": {"spinejax/steps.py"},
    "grain": {"spinejax/pipeline.py"},
    "absl": {"spinejax/pipeline.py"},
    "h5py": {"spinejax/shards.py", "spinejax/dataset.py", "spinejax/map_files.py", "data_prep/evaluation.py"},
    # One reader a file format, and one library a reader.
    "SimpleITK": {"data_prep/read_mha.py"},
    "nibabel": {"data_prep/read_nifti.py", "spinejax/map_files.py"},
    "pydicom": {
        "data_prep/dicom_headers.py",
        "data_prep/read_dicom.py",
        "data_prep/write_dicom.py",
        "data_prep/write_results.py",
    },
    "highdicom": {"data_prep/write_results.py"},
    "jinja2": {"spinejax/report.py"},
    "PIL": {"spinejax/sprites.py"},
    "distributed": {"data_prep/executors.py"},
    "sklearn": set(),
}

FORBIDDEN_NAMES = {"utils.py", "helpers.py", "common.py", "misc.py"}


def sources(*folders):
    files = [path for folder in folders for path in sorted((ROOT / folder).glob("*.py"))]
    return [path.relative_to(ROOT) for path in files]


LIBRARY = sources("spinejax", "data_prep", DETECTOR, ".")


def imports(path):
    """Dotted names that a file imports, at its top or in a function."""
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names)


def rooms_of(path):
    return {parts[1] for name in imports(path) if (parts := name.split("."))[0] == "spinejax" and len(parts) > 1} & set(
        ROOMS
    )


def test_every_room_is_in_the_list():
    assert {path.stem for path in sources("spinejax")} == {*ROOMS, "__init__"}


@pytest.mark.parametrize("room", ROOMS)
def test_imports_flow_down_the_list(room):
    above = set(ROOMS[: ROOMS.index(room)])
    assert rooms_of(Path("spinejax") / f"{room}.py") <= above


@pytest.mark.parametrize("path", sources("data_prep", DETECTOR), ids=str)
def test_data_prep_knows_the_format_and_not_the_network(path):
    assert rooms_of(path) <= SHARED | ALSO.get(str(path), set())
    loaded = {name.split(".")[0] for name in imports(path)}
    assert not {"jax", "flax", "optax"} & loaded or str(path.parent) == DETECTOR


@pytest.mark.parametrize("path", sources("spinejax"), ids=str)
def test_the_library_knows_nothing_of_data_prep(path):
    assert not any(name.split(".")[0] == "data_prep" for name in imports(path))


@pytest.mark.parametrize("path", LIBRARY, ids=str)
def test_libraries_stay_in_their_rooms(path):
    used = {name.split(".")[0] for name in imports(path)}
    for library, rooms in ONLY_IN.items():
        assert library not in used or str(path) in rooms
    assert not any("_src" in name.split(".") for name in imports(path))
    assert path.name not in FORBIDDEN_NAMES


@pytest.mark.parametrize("path", LIBRARY, ids=str)
def test_no_pickle_and_no_mutable_globals(path):
    tree = ast.parse((ROOT / path).read_text())
    assert not {"pickle", "dill", "cloudpickle", "joblib"} & {name.split(".")[0] for name in imports(path)}
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Global)]


def public(path):
    module = importlib.import_module(".".join(path.with_suffix("").parts))
    for name, value in vars(module).items():
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__:
            yield name, value


@pytest.mark.parametrize("path", [p for p in LIBRARY if p.name not in ("__main__.py", "conftest.py")], ids=str)
def test_public_names_have_docstrings_and_the_house_order_of_arguments(path):
    for name, value in public(path):
        if not (inspect.isclass(value) or inspect.isfunction(value)) or getattr(value, "_is_protocol", False):
            continue
        assert value.__doc__, f"{name} has no docstring"
        if inspect.isfunction(value):
            parameters = inspect.signature(value).parameters
            assert "rng" not in parameters or path.parts[0] == "data_prep", f"{name}: JAX keys are called key"
            assert "key" not in parameters or next(iter(parameters)) == "key", f"{name}: key comes first"
            if "train" in parameters:
                assert parameters["train"].kind is inspect.Parameter.KEYWORD_ONLY, f"{name}: train is keyword-only"


def test_importing_the_library_to_prepare_data_does_not_load_jax():
    import subprocess
    import sys

    code = "import sys, spinejax.dataset, data_prep.build, data_prep.__main__; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
