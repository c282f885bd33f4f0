"""Why hotspots of the endplate tasks do not tell sides on real scans: what labels that agree do to phantoms.

    python -m data_prep phantom --out runs/pointing-discs --patients 60 --seed 1000
    python -m benchmarks.agreeing_labels --data runs/quickstart/discs --unseen runs/pointing-discs --out runs/agreeing

Of SPIDER's discs with a damaged endplate 83 % are labelled on both sides. A phantom's endplates are damaged one by one,
and nearly always one is. Two networks learn from the same phantoms: one from the true labels, the other from labels
that have been made to agree as often as SPIDER's. Both grade phantoms that they have not seen, and the energy of each
endplate task's hotspots at its own side is measured as on real stacks, where a network grades a disc abnormal.
"""

import dataclasses
from pathlib import Path

import numpy as np
from jaxtyping import Integer
from rich.console import Console

from benchmarks.own_side import own_sides, point_in_stacks
from benchmarks.running import require_trained, run_script, start
from benchmarks.tables import show
from spinejax.commands import train
from spinejax.config import PRESETS
from spinejax.data.dataset import DataSet
from spinejax.files.json_files import write_json
from spinejax.parallel import runtime

ENDPLATES = ("upper_endplate", "lower_endplate")
NORMAL, ABNORMAL = 0, 1
TRUE, AGREEING = "true labels", "labels that agree"


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Compare where hotspots lie after learning from true labels, and from labels that agree."""

    data: Path
    """Data set of phantoms to learn from."""
    unseen: Path
    """Data set of other phantoms."""
    out: Path
    """Folder of the two runs and of `agreeing.json`."""
    both: float = 0.83
    """Share of the discs with a damaged endplate that are labelled on both sides; SPIDER's."""
    epochs: int = 72
    """Epochs of each training, at a constant rate."""


def main(arguments: Arguments) -> None:
    """Train and point with both networks, then print the table."""
    runtime.set_up()
    found = {}
    for name in (TRUE, AGREEING):
        folder = arguments.out / name.replace(" ", "-")
        data = DataSet(arguments.data)
        if name == AGREEING:
            columns = [[task.name for task in data.tasks].index(each) for each in ENDPLATES]
            data.labels = data.labels.copy()
            data.labels[:, columns] = agreeing(data.labels[:, columns], arguments.both)
        run = folder / "run"
        if not (run / "export").is_dir():
            options = {"epochs": arguments.epochs, "plateau_patience": arguments.epochs}
            train.run(dataclasses.replace(PRESETS["quickstart"][1], **options), data, run, lambda step: False)
            require_trained(run)
        if not (folder / "graded" / "predictions.csv").is_file():
            options_of_grading = ("--data", arguments.unseen, "--split", "all", "--out", folder / "graded")
            run_script("evaluate.py", "--checkpoint", run, *options_of_grading)
        point_in_stacks(DataSet(arguments.unseen), folder)
        found[name] = own_sides([folder])
        for task, each in found[name].items():
            said = f"{name}, {task}: {show(each['own_side'])} % at the own side, {each['n']} discs"
            Console().print(said, highlight=False, markup=False)
    write_json(arguments.out / "agreeing.json", found)


def agreeing(labels: Integer[np.ndarray, "N 2"], both: float) -> Integer[np.ndarray, "N 2"]:
    """Labels of both endplates, of which a share `both` of the discs with a damaged one has two; the first such discs.

    The order of phantoms means nothing. Discs without damage, or with two damaged endplates, keep their labels.
    """
    damaged = (labels == ABNORMAL).any(1)
    one = np.flatnonzero(damaged & (labels == NORMAL).any(1))
    wanted = round(both * damaged.sum()) - (damaged.sum() - len(one))
    made = labels.copy()
    made[one[: max(wanted, 0)]] = ABNORMAL
    return made


if __name__ == "__main__":
    start("agreeing_labels", Arguments, main)
