"""The detectors measured on patients that they have not seen: stacks with masks, and slices with marked discs."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from data_prep.dataset.job import Located
from data_prep.dataset.workers import workers
from data_prep.detector.detect import Detection, detect
from data_prep.detector.training.cross_fitting import fold_of
from data_prep.detector.training.marked import SPIDER, MarkedSlice, spider_slices, sudirman_slices
from data_prep.detector.weights import SHIPPED, load, member_without, provenance, weights_sum
from data_prep.look.detector_accuracy import ScanAccuracy, Summary, compare, summary, timed
from data_prep.look.intervals import Metric
from data_prep.look.marked_accuracy import SliceAccuracy, beside, compare_marks, marked_summary
from data_prep.read.metaimage import read_mha
from data_prep.read.scan import Scan
from spinejax.errors import SpinejaxError

STACKS, T2, T1, SUDIRMAN = SETS = ("stacks", "t2", "t1", "sudirman")
_SERIES = "t2_SPACE"  # of the scans with masks
_NAMED = 5  # patients that a message lists


@dataclass(frozen=True, eq=False)
class Case:
    """A scan to be measured."""

    set: str  # one of `SETS`
    source: str
    patient: str
    truth: tuple[Path, Path] | MarkedSlice  # an image and its mask, or a slice with marks
    member: int | None = None  # the detector to use; None for all of them

    def read(self) -> Scan:
        """The scan."""
        return read_mha(self.truth[0], np.float32) if isinstance(self.truth, tuple) else self.truth.read()[0]


@dataclass(frozen=True, eq=False)
class Measured:
    """A scan, what was found in it, or why it was refused, and how right that is."""

    case: Case
    found: Detection | str
    accuracy: ScanAccuracy | SliceAccuracy


def cases(spider: Path | None, sudirman: Path | None) -> list[Case]:
    """The scans of both data sets with a known truth, set by set.

    Raises:
        SpinejaxError: there is none, or a table is wrong.
    """
    masks = [] if spider is None else sorted((spider / "masks").glob(f"*_{_SERIES}.mha"))
    marked = ([] if spider is None else spider_slices(spider)) + ([] if sudirman is None else sudirman_slices(sudirman))
    found = [
        Case(STACKS, SPIDER, mask.name.split("_")[0], (mask.parents[1] / "images" / mask.name, mask)) for mask in masks
    ]
    found += [Case(_set_of(one), one.source, one.patient, one) for one in marked]
    if not found:
        raise SpinejaxError(
            f"--spider {spider}, --sudirman {sudirman}: no scan with a known truth there, expected "
            f"masks/*_{_SERIES}.mha and level_points.csv, or boxes.csv."
        )
    return sorted(found, key=lambda case: SETS.index(case.set))


def _set_of(marked: MarkedSlice) -> str:
    return SUDIRMAN if marked.source != SPIDER else T2 if marked.exact else T1


def with_unseen_members(some: Sequence[Case], weights: Path) -> list[Case]:
    """Each case with the detector that has not seen its patient.

    Raises:
        SpinejaxError: there is no such detector, so a figure would not be out-of-fold; the message names the patients.
    """
    folds = provenance(weights).get("folds", [])
    if len(folds) != len(load(weights)):
        raise SpinejaxError(
            f"{weights}: {len(load(weights))} networks, but the patients that {len(folds)} of them have not seen are "
            "listed in its .json. --ensemble measures all of them together, on patients that they may have seen."
        )
    chosen, leaked = [], []
    for case in some:
        member = member_without(case.source, case.patient, weights)
        if member is not None and member == fold_of(case.source, case.patient):
            chosen.append(replace(case, member=member))
        else:
            leaked.append(f"{case.source}/{case.patient}")
    if leaked:
        names = list(dict.fromkeys(leaked))
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        raise SpinejaxError(
            f"{weights.with_suffix('.json')}: patients whose fold is not listed as unseen by its network: "
            f"{', '.join(names[:_NAMED])}{more}. Figures with them would not be out-of-fold. --ensemble measures all "
            "networks together, and says so."
        )
    return chosen


def measure(
    some: Sequence[Case],
    *,
    weights: Path = SHIPPED,
    num_workers: int = 1,
    report: Callable[[str], None],
    find: Callable[..., Detection] = detect,
) -> list[Measured]:
    """Detect the bodies of every scan and compare them with its mask or marks.

    Args:
        some: the scans, each with the detector to use.
        weights: of the detectors.
        num_workers: number of processes.
        report: called with one line per scan.
        find: what detects, called like `detect`.

    Raises:
        SpinejaxError: a scan, its mask, or the weights cannot be used.
    """
    load(weights)  # unusable weights must raise now, not count as a refusal of every scan
    measured = []
    with workers(num_workers, None) as run_all:
        for one in run_all(partial(_measure_one, weights, find), some):
            report(f"{one.case.set}, patient {one.case.patient}: {one.accuracy.in_words()}")
            measured.append(one)
    return measured


def _measure_one(weights: Path, find: Callable[..., Detection], case: Case) -> Measured:
    scan = case.read()
    found, seconds = timed(find, scan, weights=weights, member=case.member)
    accuracy: ScanAccuracy | SliceAccuracy
    if isinstance(case.truth, tuple):
        accuracy = compare(Located.by_mask(scan, read_mha(case.truth[1], np.uint8)), found)
    else:
        accuracy = compare_marks(case.truth, scan, found)
    accuracy.seconds = seconds
    return Measured(case, found, accuracy)


# Results ---------------------------------------------------------------------------------------------------------


def results(measured: Sequence[Measured], *, weights: Path = SHIPPED) -> dict:
    """JSON values: each set's metrics and scans, T1 beside T2, and what they were measured with. No paths."""
    sets = {name: [one for one in measured if one.case.set == name] for name in SETS}
    out_of_fold = all(one.case.member is not None for one in measured)
    return {
        "weights_sha256": weights_sum(weights),
        "out_of_fold": out_of_fold,
        "measured": "each patient with the network that has not seen him"
        if out_of_fold
        else "all networks together, on patients that most of them have learned from: not out-of-fold",
        "sets": {
            name: {"summary": _summary(name, some), "scans": [_row(one) for one in some]}
            for name, some in sets.items()
            if some
        },
        "t1_over_t2": _t1_beside_t2(sets[T1], sets[T2]),
    }


def summaries(found: dict) -> dict[str, Summary]:
    """Set → its metrics, from `results`; those of T1 have also its ratios to T2."""
    tables = {name: dict(one["summary"]) for name, one in found["sets"].items()}
    if T1 in tables:
        tables[T1] |= {f"{name}, over T2's": metric for name, metric in found["t1_over_t2"].items()}
    return tables


def _summary(name: str, some: Sequence[Measured]) -> Summary:
    patients = [one.case.patient for one in some]
    accuracies: list = [one.accuracy for one in some]
    return summary(patients, accuracies) if name == STACKS else marked_summary(patients, accuracies)


def _row(one: Measured) -> dict:
    about = {"source": one.case.source, "patient": one.case.patient, "fold": one.case.member}
    return {**about, **asdict(one.accuracy)}


def _t1_beside_t2(t1: Sequence[Measured], t2: Sequence[Measured]) -> dict[str, Metric]:
    """The ratios over the patients who have both."""
    of_patient = {one.case.patient: one.accuracy for one in t2}
    pairs: list = [
        (one.case.patient, one.accuracy, of_patient[one.case.patient]) for one in t1 if one.case.patient in of_patient
    ]
    return beside(*map(list, zip(*pairs, strict=True))) if pairs else {}
