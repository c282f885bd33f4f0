import contextlib
import dataclasses
import io
import json
import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
from rich.console import Console

from data_prep.__main__ import main
from data_prep.anatomy.discs import DiscVolume
from data_prep.dataset.build import Settings, build
from data_prep.dataset.job import Job
from data_prep.phantom.phantom import phantom
from data_prep.sources.phantoms import phantom_jobs, phantom_labels
from spinejax.data.dataset import DataSet, verify
from spinejax.data.manifest import MANIFEST
from spinejax.errors import NoDeviceError, SpinejaxError
from spinejax.geometry import VOLUME_SHAPE
from spinejax.tasks import PAPER_TASKS, Task
from tests.data_prep.sources.test_spider import write_root

SETTINGS = {field.name for field in dataclasses.fields(Settings)}
TASKS = (Task("pfirrmann", ("1", "2", "3", "4", "5")),)


@dataclasses.dataclass(frozen=True)
class Cut(Job):
    """A job whose `locate` gives finished discs, and notes."""

    def cut(self):
        return self.locate()


def cut(seed, levels=("L4-L5", "L5-S1")):
    """Discs of noise; seed 13 is a scan that fails."""
    if seed == 13:
        raise SpinejaxError("scan13: its slices are black.")
    volumes = []
    for index, level in enumerate(levels):
        volume = np.full(VOLUME_SHAPE, 100 * seed + index, np.uint16)
        volumes.append(DiscVolume(level, volume, np.eye(4), (0, 15)))
    return volumes, [f"scan{seed}: T9 was left out."] if seed == 2 else []


def some_jobs(seeds):
    labels = {"L5-S1": {"pfirrmann": 2}, "L1-L2": {"pfirrmann": 1}}
    splits = ("train", "validation", "test")
    return [Cut(f"scan{s}", f"p{s}", f"s{s}", splits[s % 3], labels, partial(cut, s)) for s in seeds]


def run(jobs, out, **options):
    options = {"tasks": TASKS, "preprocessing": {}, "console": Console(quiet=True)} | options
    settings = Settings(**{name: options.pop(name) for name in SETTINGS & options.keys()})
    return build(jobs, out, settings=settings, **options)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# build ---------------------------------------------------------------------------------------------------------------


def test_bytes_depend_neither_on_workers_nor_on_the_order_of_jobs(tmp_path):
    run(some_jobs(range(5)), tmp_path / "one", shards=3)
    run(some_jobs(reversed(range(5))), tmp_path / "two", shards=3, workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert len(contents(tmp_path / "one")) == 4


def test_discs_carry_their_labels(tmp_path):
    outcome = run(some_jobs(range(3)), tmp_path / "set")
    data = DataSet(tmp_path / "set")
    assert verify(tmp_path / "set") == []
    assert outcome.discs == {"train": 2, "validation": 2, "test": 2}
    assert data.labels[data.level == "L5-S1"].ravel().tolist() == [2, 2, 2]
    assert data.labels[data.level == "L4-L5"].ravel().tolist() == [-1, -1, -1]
    assert "scan2: T9 was left out." in outcome.notes
    assert "scan0: graded, but not found in the scan: L1-L2." in outcome.notes


def graded_disc(level, grade, noise):
    """A disc volume that is as bright as its grade is low."""
    volume = np.full(VOLUME_SHAPE, 100 * (60 - 10 * grade) + noise, np.uint16)
    return DiscVolume(level, volume, np.eye(4), (0, 15))


def graded_scan(seed, moved=0):
    """Discs of five levels, whose grades are those of the scan, or of the next level below."""
    levels = ("L1-L2", "L2-L3", "L3-L4", "L4-L5", "L5-S1")
    grades = np.random.default_rng(seed).permutation(5)
    labels = {level: {"pfirrmann": int(grades[place - moved])} for place, level in enumerate(levels) if place >= moved}
    discs = [graded_disc(level, grade, seed) for level, grade in zip(levels, grades, strict=True)]
    return Cut(f"scan{seed}", f"p{seed}", f"s{seed}", "train", labels, partial(given, discs))


def given(discs):
    return discs, []


@pytest.fixture
def graded_scans(monkeypatch):
    """Twelve, of which one has its labels one level too low."""
    monkeypatch.setattr("data_prep.dataset.label_levels._MIN_PATIENTS", 12)
    monkeypatch.setattr("data_prep.dataset.label_levels._MIN_DISCS", 59)
    return [graded_scan(seed, moved=int(seed == 4)) for seed in range(12)]


def test_labels_are_compared_only_where_asked_and_change_no_byte(graded_scans, tmp_path):
    plain = run(graded_scans, tmp_path / "plain", shards=2)
    compared = run(graded_scans[::-1], tmp_path / "compared", shards=2, workers=2, compare_labels=True)
    assert contents(tmp_path / "plain") == contents(tmp_path / "compared")
    assert plain.notes == []
    assert [note.partition(":")[0] for note in compared.notes[:-1]] == ["scan4"]
    assert "one level too low" in compared.notes[0]
    assert compared.notes[-1].startswith("the labels of 12 scans were compared")
    # The notes name scans. No file of the data set does.
    assert not any(b"scan4" in content for content in contents(tmp_path / "compared").values())


def test_an_interrupted_run_compares_all_labels(graded_scans, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr("data_prep.dataset.build._assemble", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(graded_scans, tmp_path / "set", compare_labels=True)
    resumed = run(graded_scans, tmp_path / "set", compare_labels=True)
    assert resumed.resumed == 12
    assert [note.partition(":")[0] for note in resumed.notes[:-1]] == ["scan4"]


def test_among_scans_with_masks_one_without_has_empty_ones(tmp_path):
    outcome = run(some_jobs(range(3)), tmp_path, masks=("region",))
    assert outcome.failures == {}
    data = DataSet(tmp_path)
    assert data.masks == ("region",)
    assert not any(data.mask("region", row).any() for row in range(len(data)))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_progress_counts_scans_and_not_shards(tmp_path, num_workers):
    printed = io.StringIO()
    run(some_jobs(range(3)), tmp_path / "set", shards=1, workers=num_workers, console=Console(file=printed))
    assert printed.getvalue().splitlines() == ["1 of 3 scans", "2 of 3 scans", "3 of 3 scans"]


def test_no_more_processes_start_than_there_are_scans(tmp_path, monkeypatch):
    started = []

    def workers(num_workers, scheduler):
        started.append(num_workers)
        return contextlib.nullcontext(map)

    monkeypatch.setattr("data_prep.dataset.build.workers", workers)
    run(some_jobs(range(3)), tmp_path / "set", shards=2, workers=32)
    run(some_jobs(range(5)), tmp_path / "more", shards=2, workers=4)
    assert started == [3, 4]


def test_a_machine_without_the_device_stops_the_run_with_one_line(tmp_path):
    failing = [dataclasses.replace(job, locate=_no_device) for job in some_jobs(range(3))]
    with pytest.raises(NoDeviceError, match=r"^JAX_PLATFORMS is cuda$"):
        run(failing, tmp_path / "set")


def test_no_more_shards_than_patients(tmp_path):
    run(some_jobs(range(2)), tmp_path / "set", shards=8)
    assert len(DataSet(tmp_path / "set").manifest["files"]) == 2


def test_failed_scan_is_named_and_the_others_are_written(tmp_path):
    outcome = run(some_jobs([1, 13, 2]), tmp_path / "set")
    assert outcome.failures == {"scan13": "scan13: its slices are black."}
    assert set(DataSet(tmp_path / "set").patient) == {"p1", "p2"}


def test_strict_stops_at_the_first_failure(tmp_path):
    with pytest.raises(SpinejaxError, match="slices are black"):
        run(some_jobs([1, 13, 2]), tmp_path / "set", strict=True)
    assert not (tmp_path / "set" / MANIFEST).exists()


def test_if_all_scans_fail_their_reasons_are_reported(tmp_path):
    with pytest.raises(SpinejaxError, match=r"(?s)no disc was found.*scan13: its slices are black"):
        run(some_jobs([13]), tmp_path / "set")


def test_data_set_is_not_overwritten_unasked(tmp_path):
    run(some_jobs(range(5)), tmp_path / "set", shards=5)
    before = contents(tmp_path / "set")
    with pytest.raises(SpinejaxError, match="Give --overwrite"):
        run(some_jobs([1]), tmp_path / "set")
    assert contents(tmp_path / "set") == before
    (tmp_path / "set" / "notes.txt").write_text("the user's own")
    run(some_jobs([1, 2]), tmp_path / "set", overwrite=True)
    assert len(contents(tmp_path / "set")) == 4  # the old set's other shards are gone, the user's file is not
    assert len(DataSet(tmp_path / "set")) == 4


def test_what_an_interrupted_run_left_is_not_a_data_set(tmp_path):
    with pytest.raises(SpinejaxError, match="slices are black"):
        run(some_jobs([1, 13]), tmp_path / "set", strict=True)
    with pytest.raises(SpinejaxError, match="is not a data set"):
        DataSet(tmp_path / "set")
    run(some_jobs([1]), tmp_path / "set")
    assert set(DataSet(tmp_path / "set").patient) == {"p1"}


def test_shards_without_a_manifest_are_not_overwritten_unasked(tmp_path):
    run(some_jobs([1]), tmp_path / "set")
    (tmp_path / "set" / MANIFEST).unlink()
    with pytest.raises(SpinejaxError, match=r"holds discs-00000-of-00001\.h5 of another run"):
        run(some_jobs([1]), tmp_path / "set")
    run(some_jobs([1]), tmp_path / "set", overwrite=True)
    assert verify(tmp_path / "set") == []


@pytest.mark.parametrize("options", [{"shards": 0}, {"workers": 0}])
def test_options_out_of_range(tmp_path, options):
    with pytest.raises(SpinejaxError, match="1 or more"):
        run(some_jobs([1]), tmp_path / "set", **options)


def test_out_is_a_file(tmp_path):
    (tmp_path / "set").write_text("")
    with pytest.raises(SpinejaxError, match="is a file"):
        run(some_jobs([1]), tmp_path / "set")


# phantoms ------------------------------------------------------------------------------------------------------------


def test_phantom_labels_are_those_of_the_phantom():
    for patient in range(2):
        assert phantom_labels(5, patient) == phantom(5, patient).grades


def test_phantoms_are_split_by_patient():
    jobs = phantom_jobs(20, seed=0)
    assert [job.patient for job in jobs[:2]] == ["p00000", "p00001"]
    assert sorted(job.split for job in jobs) == ["test"] * 2 + ["train"] * 16 + ["validation"] * 2


# The commands --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "phantoms"
    assert main(["phantom", "--out", str(out), "--patients", "3", "--seed", "1", "--shards", "2"]) == 0
    return out


def test_phantom_command(phantoms, capsys):
    data = DataSet(phantoms)
    assert len(data) == 18
    assert data.masks == ("region", "lesion")
    assert set(data.split) == {"train", "validation", "test"}
    assert main(["verify", str(phantoms)]) == 0
    assert "18 discs, no fault" in capsys.readouterr().out


def test_stats_command(phantoms, capsys):
    assert main(["stats", str(phantoms)]) == 0
    table = capsys.readouterr().out
    assert "18 discs of 3 patients" in table
    assert "pfirrmann" in table
    assert "total" in table


def test_inspect_command(phantoms, tmp_path):
    sheet = tmp_path / "sheets" / "sheet.png"
    assert main(["inspect", str(phantoms), "--out", str(sheet), "--discs", "5"]) == 0
    assert sheet.read_bytes().startswith(b"\x89PNG")


def test_verify_command_reports_faults(phantoms, tmp_path, capsys):
    folder = tmp_path / "spoilt"
    folder.mkdir()
    for path in phantoms.iterdir():
        os.link(path, folder / path.name)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][0]["sha256"] = "0" * 64
    (folder / MANIFEST).unlink()
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert main(["verify", str(folder)]) == 2
    captured = capsys.readouterr()
    assert "1 faults" in captured.out
    assert "sha256 is not the manifest's" in captured.err


def test_spider_command_leaves_no_name_in_the_data_set(tmp_path, capsys):
    root = write_root(tmp_path / "private_root", patients=(101, 102, 103), series="t2")
    (root / "masks" / "102_t2.mha").write_bytes(b"no mask")
    out = tmp_path / "out"
    assert main(["spider", str(root), "--out", str(out)]) == 2
    captured = capsys.readouterr()
    assert "failed: 102_t2.mha" in captured.err
    assert "8 discs" in captured.out
    assert (tmp_path / "out.key").stat().st_mode & 0o777 == 0o600
    assert verify(out) == []
    for name, data in contents(out).items():
        assert b"private_root" not in data
        assert b"_t2.mha" not in data
        assert name == MANIFEST or name.startswith("discs-")
    assert not {"101", "102", "103"} & set(DataSet(out).patient)
    capsys.readouterr()
    assert main(["spider", str(root), "--out", str(out), "--overwrite", "--strict"]) == 2
    assert "not a MetaImage header" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify", "{folder}"], "is not a data set"),
        (["stats", "{folder}/none"], "is not a data set"),
        (["inspect", "{folder}", "--out", "{folder}/a.png"], "is not a data set"),
        (["spider", "{folder}", "--out", "{folder}/out"], "no images"),
        (["spider", "{folder}", "--out", "{folder}/out", "--key", "{folder}/out/key"], "inside the data set"),
        (["phantom", "--out", "{folder}/out", "--patients", "0"], "expected 1 to"),
        (["phantom", "--out", "{folder}/out", "--patients", "1", "--seed", "-1"], "seed of 0 or more"),
        (["phantom", "--out", "{folder}/out", "--patients", "1", "--shards", "0"], "1 or more"),
    ],
)
def test_bad_input_is_one_message_and_status_2(tmp_path, capsys, arguments, message):
    assert main([argument.format(folder=tmp_path) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_bad_sheet_options(phantoms, capsys):
    assert main(["inspect", str(phantoms), "--out", "sheet.pdf"]) == 2
    assert "a name in .png" in capsys.readouterr().err


def test_module_runs_and_helps():
    command = [sys.executable, "-m", "data_prep"]
    listed = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True).stdout
    for name in ("phantom", "spider", "scans", "overlay", "verify", "stats", "inspect"):
        assert name in listed
    options = subprocess.run([*command, "spider", "--help"], capture_output=True, text=True, check=True).stdout
    for option in ("--out", "--series", "--key", "--shards", "--workers", "--overwrite", "--strict", "--seed", "ROOT"):
        assert option in options
    unknown = subprocess.run([*command, "nothing"], capture_output=True, text=True)
    assert unknown.returncode == 2
    assert "Traceback" not in unknown.stderr


def test_overwriting_keeps_the_old_set_until_the_new_one_is_whole(tmp_path):
    """A run that makes nothing leaves the old data set as it was, and nothing of its own."""
    out = tmp_path / "set"
    assert main(["phantom", "--out", str(out), "--patients", "3", "--shards", "2"]) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    failing = [dataclasses.replace(job, locate=_fail) for job in phantom_jobs(3, seed=0)]
    settings = {"tasks": PAPER_TASKS, "masks": ("region", "lesion"), "preprocessing": {}, "console": Console()}
    with pytest.raises(SpinejaxError, match="no disc was found"):
        run(failing, out, overwrite=True, **settings)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert main(["phantom", "--out", str(out), "--patients", "4", "--shards", "3", "--overwrite"]) == 0
    assert verify(out) == []
    assert len(list(out.glob("discs-*"))) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set"]


def test_a_run_that_makes_nothing_does_not_stand_in_the_way_of_the_next(tmp_path):
    failing = [dataclasses.replace(job, locate=_fail) for job in phantom_jobs(2, seed=0)]
    settings = {"tasks": PAPER_TASKS, "masks": ("region", "lesion"), "preprocessing": {}, "console": Console()}
    with pytest.raises(SpinejaxError, match=r"(?s)no disc was found.*too dark"):
        run(failing, tmp_path / "set", **settings)
    assert main(["phantom", "--out", str(tmp_path / "set"), "--patients", "3"]) == 0


def _fail():
    raise SpinejaxError("too dark")


def _no_device():
    raise NoDeviceError("JAX_PLATFORMS is cuda")
