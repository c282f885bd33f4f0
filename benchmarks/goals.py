"""The goals of the network that ships, and what it reaches: over all folds, and without those that chose the recipe."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.graded_folds import JUDGES, NETWORK, REGRESSION, STATISTICS, Pool
from benchmarks.tables import show, table
from spinejax.metrics import grading
from spinejax.metrics.grading import Rule


@dataclass(frozen=True)
class Goal:
    """What a measure of the discs of a source and contrast should reach, and how their grades are decided."""

    discs: str
    task: str
    measure: Callable[[np.ndarray], np.ndarray]
    goal: float
    decide_by: Rule = "balance"


# Within ±1 and κ ask for another grade than the mean per class does: the one of the least expected distance.
GOALS = (
    Goal("SPIDER T2", "pfirrmann", grading.mean_per_class_accuracy, 0.65),
    Goal("Sudirman T2", "pfirrmann", grading.mean_per_class_accuracy, 0.66),
    Goal("SPIDER T2", "pfirrmann", grading.within_one, 0.965),
    Goal("SPIDER T2", "pfirrmann", grading.within_one, 0.965, "distance"),
    Goal("Sudirman T2", "pfirrmann", grading.within_one, 0.965),
    Goal("Sudirman T2", "pfirrmann", grading.within_one, 0.965, "distance"),
    Goal("SPIDER T2", "pfirrmann", grading.kappa, 0.82),
    Goal("SPIDER T2", "pfirrmann", grading.kappa, 0.82, "distance"),
    Goal("SPIDER T2", "narrowing", grading.mean_per_class_accuracy, 0.87),
    Goal("SPIDER T2", "upper_endplate", grading.mean_per_class_accuracy, 0.79),
    Goal("SPIDER T2", "lower_endplate", grading.mean_per_class_accuracy, 0.79),
    Goal("SPIDER T2", "modic", grading.mean_per_class_accuracy, 0.77),
)


def against_goals(pool: Pool) -> list[dict[str, Any]]:
    """What the network reaches of each goal, and how much better it is than the regression; JSON.

    The recipe was chosen on the patients of `JUDGES`, so the other folds' figures are given a second time, alone.
    """
    chosen_on = np.isin(pool.folds, JUDGES)
    return [
        {
            "discs": goal.discs,
            "task": goal.task,
            "measure": goal.measure.__name__,
            "goal": goal.goal,
            "decide_by": goal.decide_by,
            "all folds": _reached(pool, goal, np.ones(len(chosen_on), bool)),
            "folds 2 to 4": _reached(pool, goal, ~chosen_on),
        }
        for goal in GOALS
        if goal.discs in pool.groups
    ]


def _reached(pool: Pool, goal: Goal, inside: np.ndarray) -> dict[str, Any]:
    (task,) = (task for task in pool.tasks if task.name == goal.task)
    confusions = []
    for who in (NETWORK, REGRESSION):
        probabilities, labels, patients = pool.labelled(task, inside & (pool.groups == goal.discs), who)
        grades = grading.decide(probabilities, goal.decide_by)
        confusions.append(grading.patient_confusions(labels, grades, patients, task.num_grades))
    return {
        "n": int(confusions[0].sum()),
        "reached": grading.estimate(goal.measure, confusions[0]).to_json(),
        "better than the regression by": grading.difference(goal.measure, *confusions).to_json(),
    }


def markdown(found: Sequence[Mapping[str, Any]]) -> str:
    """A table of the goals."""
    words = {statistic.__name__: words for words, statistic in STATISTICS.items()}
    of_folds = ("n", "reached", "better than the regression by")
    others = (f"folds 2 to 4: {each}" for each in of_folds)
    rows = []
    for each in found:
        measure = each["measure"]
        goal = f"{each['goal']:.2f}" if measure == "kappa" else f"{100 * each['goal']:g}"
        rows.append([each["discs"], each["task"], words[measure], each["decide_by"], goal])
        for folds in ("all folds", "folds 2 to 4"):
            n, *estimates = (each[folds][name] for name in of_folds)
            rows[-1] += [n, *(show(estimate, measure) for estimate in estimates)]
    return table(("discs", "task", "measure", "grade by", "goal", *of_folds, *others), rows)
