"""Fitting how doubtful a detection is, to scans that the detector in question has not seen.

Each scan is searched by the detector that was trained without its patient. The probability of wrong levels is a
logistic regression on `Evidence`, against the marks of somebody else; the uncertainty of corners is a line through the
quantiles of their errors, against masks.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from sklearn.linear_model import LogisticRegression, QuantileRegressor

from data_prep.anatomy.vertebrae import bodies_from_spider_mask
from data_prep.detector.detect import Detection, detect
from data_prep.detector.doubt import Calibration, Evidence
from data_prep.detector.training.cross_fitting import NUM_FOLDS, fold_of
from data_prep.detector.training.marked import SPIDER, MarkedSlice
from data_prep.detector.training.matching import discs_at_marks
from data_prep.read.metaimage import read_mha
from data_prep.read.scan import Scan
from spinejax.errors import SpinejaxError

_PENALTY = 1.0  # of the logistic regression: wrong levels are rare, and few weights can be told from so few
_COVERED = 0.9


class Seen(NamedTuple):
    """What the detector that has not seen a patient made of one of his scans."""

    fold: int
    evidence: Evidence | None = None  # of a slice in which discs were found at the marks
    wrong: bool = False  # their levels are not those of the marks
    spreads_mm: Sequence[float] = ()  # of each corner of a scan with a mask
    errors_mm: Sequence[float] = ()


def calibrated(
    weights: Path,
    marked: Sequence[MarkedSlice],
    stacks: Sequence[tuple[Path, Path]],
    tell: Callable[[str], None],
    run_all: Callable[..., Iterable[Seen]] = map,
) -> tuple[Calibration, list[Calibration]]:
    """Fit the doubt of levels to marked slices, and that of corners to scans with masks.

    Args:
        weights: of the detectors.
        marked: the slices.
        stacks: images and their masks.
        tell: called with a line of progress.
        run_all: what runs a function over all scans, like `map`.

    Returns:
        The calibration of the detectors together. And one for each of them, fitted without the patients that it has not
        seen: so that its figures for these are out-of-fold, too.
    """
    seen = [*run_all(partial(_seen_in_slice, weights), marked), *run_all(partial(_seen_in_stack, weights), stacks)]
    wrong = [one.wrong for one in seen if one.evidence]
    errors_mm = [error for one in seen for error in one.errors_mm]
    tell(f"levels: {sum(wrong)} of {len(wrong)} slices wrong; corners: {len(errors_mm)} of scans with masks")
    return _fit(seen), [_fit([one for one in seen if one.fold != fold]) for fold in range(NUM_FOLDS)]


def _seen_in_slice(weights: Path, marked: MarkedSlice) -> Seen:
    fold, (scan, _) = fold_of(marked.source, marked.patient), marked.read()
    found = _detected(scan, weights, fold)
    if found is None or found.evidence is None:
        return Seen(fold)
    at_marks = discs_at_marks(marked, scan, found.bodies)
    return Seen(fold, found.evidence, not at_marks.levels_right) if at_marks.discs else Seen(fold)


def _seen_in_stack(weights: Path, stack: tuple[Path, Path]) -> Seen:
    image, mask = stack
    fold, scan = fold_of(SPIDER, mask.name.split("_")[0]), read_mha(image, np.float32)
    true = {body.name: body for body in bodies_from_spider_mask(read_mha(mask, np.uint8))[0]}
    found = _detected(scan, weights, fold)
    if found is None:
        return Seen(fold)
    spreads_mm, errors_mm = [], []
    for body in found.bodies:
        if body.name in true and body.name in found.spread_mm:
            off_mm = np.linalg.norm((body.corners - true[body.name].corners) * scan.spacing_mm[:2], axis=1)
            errors_mm += off_mm[np.isfinite(off_mm)].tolist()
            spreads_mm += [found.spread_mm[body.name]] * int(np.isfinite(off_mm).sum())
    return Seen(fold, spreads_mm=spreads_mm, errors_mm=errors_mm)


def _detected(scan: Scan, weights: Path, member: int) -> Detection | None:
    try:
        return detect(scan, weights=weights, member=member)
    except SpinejaxError:
        return None


def _fit(seen: Sequence[Seen]) -> Calibration:
    evidence = [one.evidence for one in seen if one.evidence]
    wrong = np.array([one.wrong for one in seen if one.evidence], bool)
    spreads_mm = np.array([spread for one in seen for spread in one.spreads_mm])
    errors_mm = np.array([error for one in seen for error in one.errors_mm])
    fitted = Calibration()
    if wrong.any() and not wrong.all():
        fitted = replace(fitted, **fit_levels(evidence, wrong))
    return replace(fitted, **fit_corners(spreads_mm, errors_mm)) if len(errors_mm) else fitted


def fit_levels(evidence: Sequence[Evidence], wrong: Bool[np.ndarray, "N"]) -> dict[str, Any]:
    """The fields of `Calibration` that give the probability of wrong levels: logistic regression."""
    fit = LogisticRegression(C=_PENALTY).fit(np.array([one.features() for one in evidence]), wrong)
    return {"level_weights": tuple(map(float, fit.coef_[0])), "level_bias": float(fit.intercept_[0])}


def fit_corners(spreads_mm: Float[np.ndarray, "N"], errors_mm: Float[np.ndarray, "N"]) -> dict[str, Any]:
    """The fields that give the uncertainty of corners: half of the line below which 90 % of the errors lie."""
    fit = QuantileRegressor(quantile=_COVERED, alpha=0).fit(spreads_mm[:, None], errors_mm)
    return {"corner_bias_mm": float(fit.intercept_ / 2), "corner_slope": float(fit.coef_[0] / 2)}
