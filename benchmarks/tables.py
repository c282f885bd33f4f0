"""The Markdown tables of docs/results.md and the model card, and their cells."""

from collections.abc import Collection, Iterable, Mapping

import numpy as np

from spinejax.metrics.grading import Estimate
from spinejax.report.tables import percent


def table(columns: Collection[object], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table with a line for each row.

    Example:
        >>> print(table(["level", "n"], [["L1-L2", 3]]), end="")
        | level | n |
        |---|---|
        | L1-L2 | 3 |
    """
    head, *body = (f"| {' | '.join(map(str, cells))} |" for cells in (columns, *rows))
    return "\n".join([head, "|---" * len(columns) + "|", *body]) + "\n"


def show(estimate: Mapping[str, float | None], statistic: str = "") -> str:
    """An estimate with its interval: κ as a number, other statistics in per cent."""
    value = Estimate(**{name: np.nan if number is None else number for name, number in estimate.items()})
    if statistic == "kappa":
        return f"{value.value:.2f} [{value.low:.2f}, {value.high:.2f}]"
    return percent(value)
