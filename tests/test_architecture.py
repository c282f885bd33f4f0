"""The plan of the two packages, held by a test: which folder may import which, which file may use which library."""

import ast
import graphlib
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A folder, or a file beside the folders, may import those before it in its list, and files of its own folder.
ROOMS = {
    "spinejax": (
        "errors",
        "tasks",
        "paper",
        "geometry",
        "files",
        "metrics",
        "network",
        "config",
        "parallel",
        "data",
        "training",
        "inference",
        "api",
        "report",
        "commands",
    ),
    "data_prep": (
        "read",
        "anatomy",
        "phantom",
        "dataset",
        "detector",
        "look",
        "sources",
        "output",
        "commands",
        "__main__",
    ),
}

# What data_prep may use of spinejax: the data set's format, never the network.
SHARED = {"errors", "tasks", "paper", "geometry", "files", "data"}

# Training the detectors sets JAX up in each process, as train.py does; detecting checks that there is a device.
ALSO_SHARED = {"data_prep/detector/training/run.py": {"parallel"}, "data_prep/sources/scan_files.py": {"parallel"}}

# `evaluate.py --scan` cuts discs out of raw scans first.
USES_DATA_PREP = {"spinejax/commands/evaluate.py"}

# The network knows arrays, tasks and shapes, and nothing of files, data sets or devices.
NETWORK_LIBRARIES = {"jax", "flax", "numpy", "jaxtyping"}

# Libraries that only some files may import; a change of library is then a change of one file.
ONLY_IN = {
    "orbax": {"spinejax/training/saved_step.py"},
    "grain": {"spinejax/data/batches.py"},
    "absl": {"spinejax/data/batches.py"},
    "h5py": {
        "spinejax/files/hdf5.py",  # writes
        "spinejax/data/dataset.py",
        "data_prep/output/read_evaluation.py",
    },
    # One reader a file format, and one library a reader.
    "SimpleITK": {"data_prep/read/metaimage.py"},
    "nibabel": {"data_prep/read/nifti.py", "spinejax/report/hotspot_files.py"},
    "pydicom": {
        "data_prep/read/dicom_files.py",
        "data_prep/read/dicom.py",
        "data_prep/phantom/write_dicom.py",
        "data_prep/output/dicom_objects.py",
        "data_prep/output/dicom_images.py",
        "data_prep/output/patient_fields.py",
    },
    "highdicom": {"data_prep/output/dicom_objects.py", "data_prep/output/dicom_images.py"},
    "dicomweb_client": {"data_prep/read/dicomweb.py"},
    "requests": {"data_prep/read/dicomweb.py"},  # what dicomweb-client raises
    "retrying": {"data_prep/read/dicomweb.py"},
    # Every HTML page is made with one environment, one content policy and one coding of pictures.
    "jinja2": {"spinejax/files/html.py"},
    "PIL": {"spinejax/files/html.py"},
    "fsspec": {"spinejax/files/stores.py"},
    "distributed": {"data_prep/dataset/workers.py"},
    "sklearn": {"data_prep/detector/training/calibration.py", "spinejax/inference/unusual.py"},
}

FORBIDDEN_NAMES = {"utils.py", "helpers.py", "common.py", "misc.py"}

SOURCES = [path.relative_to(ROOT) for package in ROOMS for path in sorted((ROOT / package).rglob("*.py"))]
LIBRARY = [*SOURCES, Path("train.py"), Path("evaluate.py")]


def imports(path):
    """Dotted names that a file imports, at its top or in a function."""
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names)


def room_of(path):
    """The folder below the package that a file lies in, or its own name if it lies beside the folders."""
    return path.parts[1] if len(path.parts) > 2 else path.stem


def rooms_used(path, package):
    """The rooms of a package that a file imports from."""
    parts = [name.split(".") for name in imports(path)]
    return {each[1] for each in parts if each[0] == package and len(each) > 1} & set(ROOMS[package])


@pytest.mark.parametrize("package", ROOMS)
def test_every_room_is_in_the_list(package):
    found = {room_of(path) for path in SOURCES if path.parts[0] == package}
    assert found - {"__init__"} == set(ROOMS[package])


@pytest.mark.parametrize("path", [path for path in SOURCES if room_of(path) != "__init__"], ids=str)
def test_imports_flow_down_the_list(path):
    package, room = path.parts[0], room_of(path)
    before = set(ROOMS[package][: ROOMS[package].index(room)])
    assert rooms_used(path, package) <= before | {room}


@pytest.mark.parametrize("package", ROOMS)
def test_files_of_one_folder_import_each_other_in_no_circle(package):
    graph = {}
    for path in SOURCES:
        if path.parts[0] == package:
            module = ".".join(path.with_suffix("").parts)
            graph[module] = {name for name in imports(path) if name.startswith(package)} - {module}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


@pytest.mark.parametrize("path", [path for path in SOURCES if path.parent == Path("data_prep/detector")], ids=str)
def test_detecting_needs_nothing_of_its_training(path):
    assert not any(name.startswith("data_prep.detector.training") for name in imports(path))


@pytest.mark.parametrize("path", [path for path in SOURCES if path.parts[0] == "data_prep"], ids=str)
def test_data_prep_knows_the_format_and_not_the_network(path):
    assert rooms_used(path, "spinejax") <= SHARED | ALSO_SHARED.get(str(path), set())
    loaded = {name.split(".")[0] for name in imports(path)}
    assert not {"jax", "flax", "optax"} & loaded or room_of(path) == "detector"


@pytest.mark.parametrize("path", [path for path in SOURCES if path.parts[0] == "spinejax"], ids=str)
def test_the_library_knows_nothing_of_data_prep(path):
    assert str(path) in USES_DATA_PREP or not any(name.split(".")[0] == "data_prep" for name in imports(path))


@pytest.mark.parametrize("path", [path for path in SOURCES if room_of(path) == "network"], ids=str)
def test_the_network_imports_nothing_but_jax_and_flax(path):
    used = {name.split(".")[0] for name in imports(path)} - sys.stdlib_module_names - {"spinejax"}
    assert used <= NETWORK_LIBRARIES


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
    module = importlib.import_module(".".join(path.with_suffix("").parts).removesuffix(".__init__"))
    for name, value in vars(module).items():
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__:
            yield name, value


@pytest.mark.parametrize("path", [path for path in LIBRARY if path.name != "__main__.py"], ids=str)
def test_public_names_have_docstrings_and_the_house_order_of_arguments(path):
    for name, value in public(path):
        if not (inspect.isclass(value) or inspect.isfunction(value)) or getattr(value, "_is_protocol", False):
            continue
        assert value.__doc__, f"{name} has no docstring"
        if inspect.isfunction(value):
            parameters = inspect.signature(value).parameters
            assert "rng" not in parameters or path.parts[0] == "data_prep", f"{name}: JAX keys are called key"
            if room_of(path) != "commands":  # whose keys are files
                assert "key" not in parameters or next(iter(parameters)) == "key", f"{name}: key comes first"
            if "train" in parameters:
                assert parameters["train"].kind is inspect.Parameter.KEYWORD_ONLY, f"{name}: train is keyword-only"


def test_preparing_data_does_not_load_jax():
    code = (
        "import sys, spinejax.data.dataset, data_prep.dataset.build, data_prep.__main__; sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_the_network_loads_nothing_of_files_and_data_sets():
    libraries = {"h5py", "orbax", "grain", "pydantic", "optax"}
    code = f"import sys, spinejax.network.spinenet; sys.exit(bool({libraries} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_the_tests_mirror_the_folders():
    for path in (ROOT / "tests").rglob("test_*.py"):
        folder = path.parent.relative_to(ROOT / "tests")
        homes = (ROOT / "spinejax" / folder, ROOT / folder)
        assert any(home.is_dir() for home in homes), f"{path}: no folder of the packages is called {folder}"
