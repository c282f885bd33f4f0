"""Two graders of the same discs: how their metrics differ, how often they agree, and which of them is right.

The graders are called A and B: two networks, two settings, or a network and a second reader. A difference is B's
metric minus A's. Its interval is a bootstrap over patients of paired differences: both get the same patients.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int, Shaped
from scipy.stats import binomtest

from spinejax.metrics import grading
from spinejax.metrics.grading import Estimate
from spinejax.tasks import UNLABELLED, Task


@dataclass(frozen=True)
class Paired:
    """A metric of A, of B, and the difference B − A."""

    a: Estimate
    b: Estimate
    difference: Estimate

    def to_json(self) -> dict:
        """The three, as in `comparison.json`."""
        return {name: each.to_json() for name, each in vars(self).items()}


@dataclass(frozen=True)
class McNemar:
    """McNemar's exact test of which grader is right more often, over discs.

    It takes discs as independent, which those of one patient are not: the interval over patients is the safer judge.
    """

    only_a: int
    """Discs that A alone graded as the rater did."""
    only_b: int
    p_value: float
    """Two-sided: how likely so unequal numbers are, or more unequal ones, if neither grader is better."""


@dataclass(frozen=True, eq=False)
class TaskComparison:
    """One task: `n` discs that both graded, `labelled` of them with a rater's label."""

    task: Task
    n: int
    labelled: int
    same: Estimate
    """The share of the discs to which both give the same grade."""
    kappa: Estimate
    """Between A and B, with quadratic weights; no label is needed."""
    confusion: Int[np.ndarray, "C C"]
    """A's grades in rows, B's in columns."""
    metrics: Mapping[str, Paired]
    """Statistic of `grading` → both graders against the label; empty without labels."""
    mcnemar: McNemar | None
    """None without labels."""

    @property
    def changed(self) -> int:
        """How many discs have different grades."""
        return self.n - int(np.trace(self.confusion))

    def to_json(self) -> dict:
        """The entry of one task in `comparison.json`; fractions in [0, 1]."""
        return {
            "n": self.n,
            "labelled": self.labelled,
            "changed": self.changed,
            "agreement": {"same_grade": self.same.to_json(), "kappa": self.kappa.to_json()},
            **{name: paired.to_json() for name, paired in self.metrics.items()},
            "mcnemar": vars(self.mcnemar) if self.mcnemar else None,
            "grades": list(self.task.grades),
            "confusion": self.confusion.tolist(),
        }


def compare_task(
    task: Task,
    labels: Int[np.ndarray, "N"],
    a: Int[np.ndarray, "N"],
    b: Int[np.ndarray, "N"],
    patients: Shaped[np.ndarray, "N"],
    *,
    num_resamples: int = grading.NUM_RESAMPLES,
    seed: int = 0,
) -> TaskComparison:
    """Compare two graders on one task.

    Args:
        labels: the rater's grade or `UNLABELLED`.
        a, b: the graders' grades, of the same discs.
        num_resamples, seed: draws for each 95 % interval, and their seed.

    Raises:
        ValueError: there is no disc.
    """
    if not len(a):
        raise ValueError("no disc to compare")
    draws = {"num_resamples": num_resamples, "seed": seed}
    between = grading.patient_confusions(a, b, patients, task.num_grades)
    has_one = labels != UNLABELLED
    metrics: dict[str, Paired] = {}
    if has_one.any():
        ours, theirs = (
            grading.patient_confusions(labels[has_one], grades[has_one], patients[has_one], task.num_grades)
            for grades in (a, b)
        )
        statistics = [grading.mean_per_class_accuracy, grading.kappa]
        statistics += [grading.within_one] if task.num_grades > 2 else []
        for statistic in statistics:
            one, other = (grading.estimate(statistic, counts, **draws) for counts in (ours, theirs))
            metrics[statistic.__name__] = Paired(one, other, grading.difference(statistic, theirs, ours, **draws))
    return TaskComparison(
        task=task,
        n=len(a),
        labelled=int(has_one.sum()),
        same=grading.mean_over_patients((a == b).astype(float), patients, **draws),
        kappa=grading.estimate(grading.kappa, between, **draws),
        confusion=between.sum(0),
        metrics=metrics,
        mcnemar=mcnemar(a[has_one] == labels[has_one], b[has_one] == labels[has_one]) if has_one.any() else None,
    )


def mcnemar(a_right: Bool[np.ndarray, "N"], b_right: Bool[np.ndarray, "N"]) -> McNemar:
    """McNemar's exact test (a two-sided binomial test) of the discs that one grader alone has right.

    Example:
        >>> right = np.ones(10, bool)
        >>> mcnemar(right, ~right).p_value == 2 / 2**10
        True
    """
    only_a, only_b = int((a_right & ~b_right).sum()), int((~a_right & b_right).sum())
    p_value = float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0
    return McNemar(only_a, only_b, p_value)
