"""The network that ships: trained on SPIDER and Sudirman's scans, and measured on patients that it has not seen.

`python -m benchmarks.weights --spider ROOT --sudirman ROOT --out DIR` makes one data set of both sources, trains a
network for each of five folds of the patients, grades each fold's patients with the network that has not seen them,
and trains a last network on everybody but those held out. It writes `weights.md` and `weights.json`, the tables of
docs/results.md; `mistakes.png` and `referring.png`, pictures of the model card; and `shipped/`, the two files of
`spinejax/weights/`.

The folds are fixed by hashes of the patients' numbers. One patient in eight of the others chooses the epoch. Finished
parts are kept: after an interruption, start the same command again. Options after `--` go to every training.
"""

import dataclasses
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import tyro
from rich.console import Console

from benchmarks import decisions, goals, graded_folds, referring
from benchmarks.graded_folds import Missed, Pool
from benchmarks.mistakes import draw_mistakes
from benchmarks.own_side import own_sides, point_in_stacks
from benchmarks.running import ROOT, require_trained, run_script, start
from benchmarks.subgroups import by_subgroup
from benchmarks.subgroups import markdown as subgroups_table
from data_prep.dataset.folds import write_split
from data_prep.dataset.pseudonyms import Pseudonyms, load_or_make_key
from data_prep.detector.training.cross_fitting import NUM_FOLDS
from data_prep.sources.pooled import POOLED_TASKS, Patient, patients_of, pooled_jobs, splits_of
from data_prep.sources.scan_files import Cutting
from spinejax.data.dataset import DataSet
from spinejax.files.atomic import write_atomically
from spinejax.files.json_files import write_json
from spinejax.inference import unusual
from spinejax.metrics.calibration import Fit, fit_temperature
from spinejax.parallel import runtime
from spinejax.training import shipped

PRESET = "pooled"
SERIES = ("t2", "t1", "t2_SPACE")
NUM_VIEWS = 54
ATTRIBUTION = [
    "SPIDER: J. W. van der Graaf et al., Scientific Data 11, 264 (2024), doi:10.5281/zenodo.10159290, CC BY 4.0",
    "Lumbar Spine MRI Dataset: S. Sudirman et al., doi:10.17632/k57fr854j2, and LSMA-PQR, doi:10.17632/p3r4xd2488.1, "
    "both CC BY 4.0",
]


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Train, measure and write the network that ships."""

    spider: Path
    """ROOT: the folder with images/, masks/, radiological_gradings.csv and overview.csv of SPIDER."""
    sudirman: Path
    """ROOT: the folder with images/, labels.csv and boxes.csv of the Lumbar Spine MRI Dataset."""
    out: Path
    """Folder of the data set, the runs, the tables and the network."""
    held_out: tuple[str, ...] = ("spider/7",)
    """Patients that the network that ships has not seen: that of `make demo`."""
    seed: int = 0
    """Seed of the trainings."""
    jobs: int = 1
    """Number of trainings at the same time."""
    options: tyro.conf.Positional[tuple[str, ...]] = ()
    """Options of every training, after `--`."""

    def patients_held_out(self) -> list[Patient]:
        """The patients held out, by source and number."""
        return [Patient.parse(name) for name in self.held_out]


def main(arguments: Arguments) -> None:
    """Make the data set, the networks and the tables."""
    runtime.set_up()
    key, data = pooled_discs(arguments)
    start_from = phantom_run(arguments.out)
    here = set(data.patient.tolist())
    patients = {name: patient for name, patient in everyone(arguments, key).items() if name in here}
    folds = [arguments.out / f"fold-{number}" for number in range(NUM_FOLDS)]
    for number, folder in enumerate(folds):
        if not (folder / "discs" / "manifest.json").is_file():
            splits = splits_of(patients, fold=number, held_out=arguments.patients_held_out())
            write_split(data, folder / "discs", splits, {"fold": f"{number + 1}/{NUM_FOLDS}"})
    last = arguments.out / "last"
    trainings: list[Callable[[], None]] = [
        *(lambda folder=folder: train_and_grade(folder / "discs", folder, start_from, arguments) for folder in folds),
        lambda: train_and_grade(arguments.out / "discs", last, start_from, arguments),
    ]
    side_by_side(trainings, arguments.jobs)

    pool = Pool.of_folds(data, POOLED_TASKS, folds, patients, missed_discs(arguments, key, data))
    for folder in folds:
        point_in_stacks(data, folder)
    results = pool.results()
    subgroups = by_subgroup(pool, data, patients, arguments.spider / "overview.csv")
    content = results | {
        "goals": goals.against_goals(pool),
        "referring": referring.by_group(pool),
        "decisions": decisions.by_group(pool, pool.tasks[0]),
        "subgroups": subgroups,
        "own_side": own_sides(folds),
        "recipe": " ".join(["train.py", PRESET, *arguments.options]),
    }
    write_json(arguments.out / "weights.json", content)
    draw_mistakes(pool, data, pool.tasks[0], arguments.out / "mistakes.png")
    referring.draw(content["referring"], arguments.out / "referring.png")
    tables = [graded_folds.markdown(content), subgroups_table(subgroups)]
    tables += [goals.markdown(content["goals"]), decisions.markdown(content["decisions"])]
    tables += [referring.markdown(content["referring"])]
    text = "\n".join(tables)
    write_atomically(arguments.out / "weights.md", lambda path: path.write_text(text))
    Console(width=None if sys.stdout.isatty() else 200).print(text, markup=False, highlight=False)
    ship(arguments, pool, data, patients, last / "run")


def side_by_side(functions: Iterable[Callable[[], None]], num: int) -> None:
    """Call all functions, some at the same time. The first failure is raised when the others have ended."""
    with ThreadPoolExecutor(num) as threads:
        for done in [threads.submit(function) for function in functions]:
            done.result()


# Runs ----------------------------------------------------------------------------------------------------------------


def pooled_discs(arguments: Arguments) -> tuple[Pseudonyms, DataSet]:
    """The data set of both sources, and the key of its pseudonyms.

    Both sources are public, so the key is no secret: it is the same everywhere, and so are the files.
    """
    discs = arguments.out / "discs"
    key_file = arguments.out / "discs.key"
    if not key_file.is_file():
        arguments.out.mkdir(parents=True, exist_ok=True)
        key_file.touch(mode=0o600)
        key_file.write_bytes(bytes(32))
    if not (discs / "manifest.json").is_file():
        roots = ("--spider", arguments.spider, "--sudirman", arguments.sudirman, "--series", *SERIES)
        held_out = ("--held-out", *arguments.held_out) if arguments.held_out else ()
        try:
            run_script("-m", "data_prep", "pooled", *roots, *held_out, "--workers", arguments.jobs, "--out", discs)
        except subprocess.CalledProcessError:  # some scans failed, and the others were written
            if not (discs / "manifest.json").is_file():
                raise
    return load_or_make_key(key_file, discs), DataSet(discs)


def everyone(arguments: Arguments, key: Pseudonyms) -> dict[str, Patient]:
    """Pseudonym → patient."""
    return patients_of(arguments.spider, arguments.sudirman, key)


def phantom_run(out: Path) -> Path:
    """The run on phantoms whose weights every training starts from."""
    discs, run = out / "phantoms", out / "phantom-run"
    if not (run / "export").is_dir():
        if not (discs / "manifest.json").is_file():
            run_script("-m", "data_prep", "phantom", "--out", discs, "--patients", 200, "--seed", 0)
        # The rate is never lowered: a network that has converged on phantoms takes longer to adapt.
        constant_rate = ("--epochs", 72, "--plateau-patience", 72)
        run_script("train.py", "quickstart", "--data", discs, "--workdir", run, *constant_rate)
        require_trained(run)
    return run


def train_and_grade(discs: Path, folder: Path, start_from: Path, arguments: Arguments) -> None:
    """Train one network, and grade its test patients with 54 views. Finished parts are skipped."""
    run, graded = folder / "run", folder / "graded"
    if (graded / "predictions.csv").is_file():
        return
    run_script(
        *("train.py", PRESET, "--data", discs, "--workdir", run, "--init-from", start_from),
        *("--seed", arguments.seed, *arguments.options),
    )
    require_trained(run)
    run_script("evaluate.py", "--checkpoint", run, "--data", discs, "--split", "test", "--tta", "--out", graded)


# What nobody graded, because it was not found -------------------------------------------------------------------------


def missed_discs(arguments: Arguments, key: Pseudonyms, data: DataSet) -> list[Missed]:
    """The discs that are labelled in the sources and are not in the data set."""
    jobs, _ = pooled_jobs(
        arguments.spider,
        arguments.sudirman,
        series=SERIES,
        held_out=arguments.patients_held_out(),
        pseudonyms=key,
        cutting=Cutting(convention="spider"),
    )
    found = set(zip(data.scan.tolist(), data.level.tolist(), strict=True))
    return [
        Missed(graded_folds.group(job.source, job.contrast), job.patient, labels)
        for job in jobs
        for level, labels in job.labels.items()
        if (job.scan, level) not in found
    ]


# The file that ships --------------------------------------------------------------------------------------------------


def ship(arguments: Arguments, pool: Pool, data: DataSet, patients: dict[str, Patient], run: Path) -> None:
    """Write the last network, with temperatures and raters fitted to what the folds' networks gave their patients."""
    seen = data.split[pool.rows] != "test"  # but those held out
    fit = Fit(
        num_views=NUM_VIEWS,
        average="probabilities",
        data=data.digest,
        discs={task.name: len(pool.labelled(task, seen)[1]) for task in pool.tasks},
        temperatures={task.name: fit_temperature(*pool.labelled(task, seen)[:2]) for task in pool.tasks},
        raters=pool.raters(seen),
    )
    trained_on = set(data.patient[data.rows("train")].tolist())
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=ROOT)
    shipped.write(
        run,
        arguments.out / "shipped",
        provenance={
            "name": "spinejax lumbar",
            "trained_on": "SPIDER (T1 and T2) and Sudirman's scans (T2), mostly one mid-sagittal slice each",
            "attribution": ATTRIBUTION,
            "patients": sorted("/".join(patient) for name, patient in patients.items() if name in trained_on),
            "commit": commit.stdout.strip(),
            "command": "python -m benchmarks.weights --spider ROOT --sudirman ROOT --out DIR",
        },
        contrasts=("t1", "t2"),
        temperatures=[fit],
        usual=unusual.fit(data),
    )


if __name__ == "__main__":
    start("weights", Arguments, main)
