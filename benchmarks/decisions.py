"""What each way of deciding a grade gives in a cross-validation: `--decide-by`, of the network and of a rater."""

from collections.abc import Callable, Mapping
from typing import Any, get_args

import numpy as np

from benchmarks.graded_folds import STATISTICS, Pool
from benchmarks.tables import show, table
from spinejax.metrics import grading
from spinejax.metrics.grading import Rule
from spinejax.tasks import Task


def exact_agreement(confusion: np.ndarray) -> np.ndarray:
    """The fraction of discs that have the rater's grade."""
    return np.trace(confusion, axis1=-2, axis2=-1) / confusion.sum((-2, -1))


_MEASURES: dict[str, Callable[[np.ndarray], np.ndarray]] = {"the rater's grade, %": exact_agreement} | STATISTICS


def by_group(pool: Pool, task: Task) -> dict[str, Any]:
    """Group → "network" or "rater" → rule → measure → estimate; JSON.

    The rater is the group's, fitted to the other folds. Of the network, "balance" and "probability" are the same.
    """
    found: dict[str, Any] = {}
    for name in sorted(set(pool.groups)):
        inside = pool.groups == name
        probabilities, labels, patients = pool.labelled(task, inside)
        if len(labels):
            graders = {"network": (probabilities, None), "rater": pool.as_rater(task, inside)}
            found[name] = {who: _of_grader(task, labels, patients, *given) for who, given in graders.items()}
    return found


def _of_grader(task: Task, labels, patients, probabilities, frequencies) -> dict[str, Any]:
    found = {}
    for rule in get_args(Rule):
        if frequencies is not None or rule != "probability":
            grades = grading.decide(probabilities, rule, frequencies)
            confusions = grading.patient_confusions(labels, grades, patients, task.num_grades)
            found[rule] = {
                measure.__name__: grading.estimate(measure, confusions).to_json() for measure in _MEASURES.values()
            }
    return found


def markdown(found: Mapping[str, Any]) -> str:
    """A table: a row for each group, grader and rule."""
    return table(
        ("discs", "grader", "--decide-by", *_MEASURES),
        [
            (name, who, rule, *(show(estimate, measure) for measure, estimate in measures.items()))
            for name, graders in found.items()
            for who, rules in graders.items()
            for rule, measures in rules.items()
        ],
    )
