"""Do a scan's labels fit its discs, or would they fit better one level higher or lower?

A table and a detector may count differently: a transitional vertebra is L5 for one and S1 for the other. Then every
disc has its neighbour's grades. It takes no grading network to notice that, because the data set itself shows what
discs of each grade look like, and where the graded discs of a scan usually begin and end:

- Appearance: ridge regression predicts all grades of a disc from the brightness around its centre. It is fitted without
  the patient that it judges. Its errors and the grades themselves are taken to be normal, which gives for each disc the
  logarithm of p(grades | image) / p(grades). A disc without grades has 0, so that shifts with different numbers of
  graded discs can be compared.
- Counts: the number of levels from the highest graded disc to the highest found, and from the lowest found to the
  lowest graded. A gap at the lower end is evidence for the shift that closes it. One that a shift opens is no evidence
  against it, because a transitional vertebra that only the detector counts leaves such a gap.

A scan is doubtful if a shift by one level beats its labels as they are by `DOUBT`. How many shifts that finds depends
on the data set, so it is measured there, with labels of the other scans that are moved by one level.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float32, Int
from scipy import stats

from data_prep.anatomy.discs import DiscVolume
from spinejax.geometry import INTENSITY_ONE, VOLUME_SHAPE
from spinejax.tasks import LEVELS, UNLABELLED, Task

_NOT_COMPARED = "labels were not compared with what their discs look like"

DOUBT = 4.0
"""Natural logarithm of a likelihood ratio. It was chosen on scans that were looked at (docs/data.md)."""

_PATCHES, _PATCH_PX = (8, 7), (8, 16)  # together as wide as the disc, and higher than the space between its bodies
_SLICES = (VOLUME_SHAPE[2] // 2 - 1, VOLUME_SHAPE[2] // 2 + 2)
_PENALTY = 0.1  # of the regression, per disc; 0.03 and 0.3 find as many shifts
_LEAST_EXPLAINED = 0.1  # of a task's variance; rare findings that the regression does not see would only add noise
_MAX_PER_DISC = 2.0  # so that no single disc decides
_MAX_OF_COUNTS = DOUBT  # so that appearance must agree
_UNEXPLAINED = 0.01  # is added to variances, because two tasks may say the same
_MOST = 0.5  # a task is used if it has this share of the graded discs
_MIN_DISCS, _MIN_PATIENTS = 100, 20
_USUAL_GAPS = 5  # so many values of a gap are taken to have occurred once more than they did
_REACH = 2  # levels that a label may be moved: one that is planted, and one that is tried


@dataclass(frozen=True, eq=False)
class LabelledScan:
    """What is compared of one scan."""

    name: str  # for messages
    patient: str
    labels: Mapping[str, Mapping[str, int]]  # level → task → label
    appearance: Mapping[str, Float32[np.ndarray, "F"]]  # level → `appearance` of each disc that was found


def appearance(disc: DiscVolume) -> Float32[np.ndarray, "56"]:
    """The mean intensities of patches around a disc's centre, over its three middle slices; its bodies have 0.5."""
    height, width = np.multiply(_PATCHES, _PATCH_PX)
    row, column = (VOLUME_SHAPE[0] - height) // 2, (VOLUME_SHAPE[1] - width) // 2
    first = min(max(disc.slices[0], _SLICES[0]), _SLICES[1] - 1)
    stop = max(min(disc.slices[1], _SLICES[1]), first + 1)  # one slice at least, black if the disc has none of them
    box = disc.volume[row : row + height, column : column + width, first:stop]
    patches = box.reshape(_PATCHES[0], _PATCH_PX[0], _PATCHES[1], _PATCH_PX[1], stop - first)
    return patches.mean((1, 3, 4), dtype=np.float32).ravel() / INTENSITY_ONE


def compare(scans: Sequence[LabelledScan], tasks: Sequence[Task]) -> list[str]:
    """A note on each scan whose labels fit better one level higher or lower, and one on how many shifts this finds.

    Args:
        scans: in any order. Those without a label or a disc are passed over.
        tasks: the task table. Grades are in order.
    """
    graded = [scan for scan in scans if scan.appearance and np.isfinite(_grades(scan.labels, tasks)).any()]
    if not graded:
        return []
    data = _arrange(graded, tasks)
    if reason := _too_little(data):
        return [f"{_NOT_COMPARED}: {reason}."]
    fit = _fit(data)
    if fit is None:
        return [f"{_NOT_COMPARED}: discs of one grade look no more alike than any."]
    evidence = {shift: _evidence(data, fit, shift) for shift in (-1, 1)}
    doubtful = np.maximum(*(parts.sum(0) for parts in evidence.values())) > DOUBT
    notes = []
    for index in np.flatnonzero(doubtful).tolist():
        shift = max(evidence, key=lambda shift: evidence[shift][:, index].sum())
        notes.append(_note(data.names[index], shift, *evidence[shift][:, index]))
    found = " and ".join(
        f"{_rate(_found(data, fit, moved)[~doubtful])} if their labels were one level too {where}"
        for where, moved in (("low", -1), ("high", 1))
    )
    compared = f"the labels of {len(data.names)} scans were compared with what their discs look like"
    return [*notes, f"{compared}; doubtful: {len(notes)}. Of the others it would find {found}."]


def _note(name: str, shift: int, appearance: float, counts: float) -> str:
    where, disc, label = ("low", "L4-L5", "L5-S1") if shift > 0 else ("high", "L5-S1", "L4-L5")
    return (
        f"{name}: its labels may be one level too {where}: they fit better if the disc named {disc} has those of "
        f"{label}, and so on (evidence {appearance + counts:.1f}: appearance {appearance:.1f}, counts {counts:.1f}; "
        f"doubtful above {DOUBT:g}). A transitional vertebra, or a detector or a table that is off by one? Look at the "
        "scan; then leave it out, or correct the table, or its levels (`scans --corners` or `--lowest-level`)."
    )


def _rate(found: Bool[np.ndarray, "n"]) -> str:
    """A proportion, with its exact interval (Clopper and Pearson)."""
    if not len(found):
        return "0 of 0"
    low, high = stats.binomtest(int(found.sum()), len(found)).proportion_ci(method="exact")
    return (
        f"{found.sum()} of {len(found)} ({100 * found.mean():.0f} %, 95 % interval {100 * low:.0f} to {100 * high:.0f})"
    )


# Scans as arrays -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Data:
    """n scans with N discs, and the U tasks that are used. Levels are indices into `LEVELS`."""

    names: Sequence[str]
    patient: Int[np.ndarray, "n"]
    grades: Float[np.ndarray, "n L U"]  # standardised; NaN where missing, as in `_REACH` more levels at each end
    above: Int[np.ndarray, "n"]  # levels from the highest graded disc up to the highest found; may be negative
    below: Int[np.ndarray, "n"]  # levels from the lowest graded disc down to the lowest found
    scan: Int[np.ndarray, "N"]
    level: Int[np.ndarray, "N"]
    is_lowest: Bool[np.ndarray, "N"]
    features: Float[np.ndarray, "N F"]

    def grades_of_discs(self, offset: int) -> Float[np.ndarray, "N U"]:
        """The grades that each disc has if it takes those of the level `offset` below its own."""
        return self.grades[self.scan, self.level + _REACH + offset]


def _arrange(scans: Sequence[LabelledScan], tasks: Sequence[Task]) -> _Data:
    """The scans in order of their names, so that results do not depend on the order in which they were cut."""
    scans = sorted(scans, key=lambda scan: scan.name)
    grades = np.stack([_grades(scan.labels, tasks) for scan in scans])
    graded = [np.flatnonzero(own) for own in np.isfinite(grades).any(2)]
    levels = [np.array([LEVELS.index(level) for level in scan.appearance]) for scan in scans]
    return _Data(
        names=[scan.name for scan in scans],
        patient=np.unique([scan.patient for scan in scans], return_inverse=True)[1],
        grades=_standardised(grades),
        above=np.array([own.min() - found.min() for own, found in zip(graded, levels, strict=True)]),
        below=np.array([found.max() - own.max() for own, found in zip(graded, levels, strict=True)]),
        scan=np.repeat(np.arange(len(scans)), [len(found) for found in levels]),
        level=np.concatenate(levels),
        is_lowest=np.concatenate([found == found.max() for found in levels]),
        features=np.array([one for scan in scans for one in scan.appearance.values()], np.float64),
    )


def _grades(labels: Mapping[str, Mapping[str, int]], tasks: Sequence[Task]) -> Float[np.ndarray, "9 T"]:
    rows = [[labels.get(level, {}).get(task.name, UNLABELLED) for task in tasks] for level in LEVELS]
    return np.where(np.array(rows) == UNLABELLED, np.nan, rows)


def _standardised(grades: Float[np.ndarray, "n 9 T"]) -> Float[np.ndarray, "n L U"]:
    """The tasks that most graded discs have and that differ, with mean 0 and variance 1, and with empty levels."""
    discs = grades[np.isfinite(grades).any(2)]
    common = np.isfinite(discs).sum(0) > _MOST * len(discs)
    mean, spread = np.nanmean(discs[:, common], axis=0), np.nanstd(discs[:, common], axis=0)
    standard = (grades[:, :, common][:, :, spread > 0] - mean[spread > 0]) / spread[spread > 0]
    return np.pad(standard, ((0, 0), (_REACH, _REACH), (0, 0)), constant_values=np.nan)


def _too_little(data: _Data) -> str | None:
    """Why nothing can be compared, if so."""
    if not data.grades.shape[2]:
        return "the graded discs all have the same grades, or no task in common"
    complete = np.isfinite(data.grades_of_discs(0)).all(1)
    patients = len(set(data.patient[data.scan[complete]]))
    if complete.sum() < _MIN_DISCS or patients < _MIN_PATIENTS:
        return f"{complete.sum()} discs of {patients} patients are graded, {_MIN_DISCS} of {_MIN_PATIENTS} are needed"
    return None


# Evidence ------------------------------------------------------------------------------------------------------------


def _predicted(data: _Data) -> Float[np.ndarray, "N U"]:
    """Each disc's grades by ridge regression on its features, fitted to the graded discs of all other patients.

    A patient is left out by an identity of least squares (Woodbury's), instead of by another fit.
    """
    features = (data.features - data.features.mean(0)) / (data.features.std(0) + 1e-6)
    inputs = np.column_stack([np.ones(len(features)), features])
    grades = data.grades_of_discs(0)
    complete = np.isfinite(grades).all(1)
    penalty = np.full(inputs.shape[1], _PENALTY * complete.sum())
    penalty[0] = 0
    inverse = np.linalg.inv(inputs[complete].T @ inputs[complete] + np.diag(penalty))
    weights = inverse @ inputs[complete].T @ grades[complete]
    predicted = np.empty_like(grades)
    patient = data.patient[data.scan]
    in_order = np.argsort(patient, kind="stable")
    for discs in np.split(in_order, np.flatnonzero(np.diff(patient[in_order])) + 1):
        own = discs[complete[discs]]
        back = inverse @ inputs[own].T
        errors = np.linalg.solve(np.eye(len(own)) - inputs[own] @ back, grades[own] - inputs[own] @ weights)
        predicted[discs] = inputs[discs] @ (weights - back @ errors)
    return predicted


def _fit(data: _Data) -> dict[int, Float[np.ndarray, "N"]] | None:
    """Offset → log p(grades | image) / p(grades) of each disc with the grades that many levels below; 0 without any.

    None if appearance explains no task.
    """
    predicted = _predicted(data)
    known = data.grades_of_discs(0)
    complete = np.isfinite(known).all(1)
    errors = (known - predicted)[complete]
    shown = errors.var(0) < (1 - _LEAST_EXPLAINED) * known[complete].var(0)
    if not shown.any():
        return None
    of_errors = stats.multivariate_normal(cov=_covariance(errors[:, shown]))
    of_grades = stats.multivariate_normal(cov=_covariance(known[complete][:, shown]))
    fit = {}
    for offset in range(-_REACH, _REACH + 1):
        grades = data.grades_of_discs(offset)
        given = np.isfinite(grades).all(1)
        fit[offset] = np.zeros(len(grades))
        ratios = of_errors.logpdf((grades - predicted)[given][:, shown]) - of_grades.logpdf(grades[given][:, shown])
        fit[offset][given] = np.clip(ratios, -_MAX_PER_DISC, _MAX_PER_DISC)
    return fit


def _covariance(values: Float[np.ndarray, "N T"]) -> Float[np.ndarray, "T T"]:
    return values.T @ values / len(values) + _UNEXPLAINED * np.eye(values.shape[1])


def _evidence(
    data: _Data, fit: Mapping[int, Float[np.ndarray, "N"]], shift: int, *, planted: int = 0
) -> Float[np.ndarray, "2 n"]:
    """How much likelier each scan's labels are after a shift, by appearance and by counts; the logarithm.

    With labels that were moved by `planted` levels first, the lower end says nothing: it is the detector that may have
    counted one disc too many or too few there. If it missed the lowest disc, that has no appearance either.
    """
    seen = ~data.is_lowest if planted > 0 else np.ones(len(data.scan), bool)
    better = np.bincount(data.scan, seen * (fit[planted + shift] - fit[planted]), len(data.names))
    above = data.above - planted
    counts = _log_share(data, data.above, above - shift) - _log_share(data, data.above, above)
    if not planted:
        closed = _log_share(data, data.below, data.below + shift) - _log_share(data, data.below, data.below)
        counts += np.maximum(closed, 0)
    return np.stack([better, np.minimum(counts, _MAX_OF_COUNTS)])


def _log_share(data: _Data, gaps: Int[np.ndarray, "n"], asked: Int[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """The logarithm of how often each of `asked` is among the gaps of other patients' scans."""
    of_all, of_patient, scans = Counter(gaps), Counter(zip(data.patient, gaps, strict=True)), Counter(data.patient)
    counts = [of_all[gap] - of_patient[patient, gap] for patient, gap in zip(data.patient, asked, strict=True)]
    others = [len(gaps) - scans[patient] for patient in data.patient]
    return np.log((np.array(counts) + 1) / (np.array(others) + _USUAL_GAPS))


def _found(data: _Data, fit: Mapping[int, np.ndarray], moved: int) -> Bool[np.ndarray, "n"]:
    """Whether each scan would be doubted, for the right reason, if its labels were moved by so many levels."""
    back = _evidence(data, fit, -moved, planted=moved).sum(0)
    return (back > DOUBT) & (back >= _evidence(data, fit, moved, planted=moved).sum(0))
