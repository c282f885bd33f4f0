"""The results of an evaluation, and `results.json`."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spinejax.data.dataset import ALL
from spinejax.files.json_files import write_json
from spinejax.metrics.calibration import Doubt, Kept
from spinejax.metrics.grading import TaskResult
from spinejax.metrics.pointing import Pointing
from spinejax.report import figures

RESEARCH_ONLY = "Research use only: not a medical device, not for diagnosis."


_FILES = ("predictions.csv", "results.json", "confusion.png", "trust.png")
REPLACED = (*_FILES, "hotspots/*")
"""Patterns of the files of an evaluation, which the next one into the same folder replaces."""


@dataclass(frozen=True)
class Findings:
    """The results of an evaluation over all discs."""

    about: Mapping[str, Any]
    """What was evaluated and how: `split`, `num_views` and more, JSON values."""
    branch_point: str | None
    results: Sequence[TaskResult]
    """One entry for each task that has labels; so has `doubts`."""
    doubts: Sequence[Doubt] = ()
    calibration: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Task name → `calibration.before_and_after`, and the temperature if there is one; empty without `--calibrate`."""
    pointing: Mapping[str, Pointing] = field(default_factory=dict)
    """Task name → how well its hotspots point; empty without hotspots or masks."""
    kept: Sequence[Kept] = ()
    """One entry for each task if doubtful grades are referred to a rater."""

    def cautions(self) -> list[str]:
        """What a reader must know about the network and the split before reading the metrics."""
        split, found = self.about["split"], []
        if not self.about["trained_on_this_data"]:
            found.append("The network was trained on another data set, which may contain patients of this one.")
        elif split == "train":
            found.append("The network was trained on the discs of this split: expect lower metrics on other discs.")
        elif split == ALL:
            found.append("The network was trained on the train split of these discs: expect lower metrics on others.")
        if self.about["split_chose_the_step"]:
            chose = self.about["validation_split"] if split == ALL else split
            found.append(
                f"The {chose} split decided this network's learning rate and which step was kept: expect lower metrics "
                "on other discs."
            )
        if number := self.about.get("unusual_discs"):
            found.append(
                f"{number} of {self.about['discs']} discs look unlike those that the network learned from: check their "
                "grades."
            )
        return found


def write_results(out: Path, findings: Findings) -> None:
    """Write `results.json` and the plots; fractions are in [0, 1], and null where a metric is not defined."""
    content = {
        **findings.about,
        "tasks": {result.task.name: result.to_json() for result in findings.results},
        "doubt": {doubt.task.name: doubt.to_json() for doubt in findings.doubts},
        "note": RESEARCH_ONLY,
    }
    if findings.calibration:
        content["calibration"] = findings.calibration
    if findings.pointing:
        content["hotspots"] = {name: found.to_json() for name, found in findings.pointing.items()}
    if findings.kept:
        content["referral"] = {kept.task.name: kept.to_json() for kept in findings.kept}
    write_json(out / "results.json", content)
    if findings.results:
        figures.confusion_matrices(findings.results, out / "confusion.png")
        figures.trust(findings.doubts, out / "trust.png")


def remove_earlier(out: Path) -> None:
    """Remove the results of an earlier evaluation, so that none is mistaken for one of this network."""
    shutil.rmtree(out / "hotspots", ignore_errors=True)
    for name in _FILES:
        (out / name).unlink(missing_ok=True)
