"""How doubtful a detection is: the probability that its levels are wrong, and how far its corners may be off.

Both are fitted to scans that a detector had not seen (`training.calibration`) and stored with its weights.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from pydantic import TypeAdapter

MAX_DOUBT = 0.2  # levels that are wrong with a greater probability are flagged
NO_SACRUM = 0.5  # the doubt of levels that are counted without a sacrum: it may be in view, unseen, or not
MAX_MARGIN = 12.0
_MIN_SCORE, _MAX_SCORE = 0.02, 0.98


@dataclass(frozen=True)
class Evidence:
    """What the levels of a scan were decided by."""

    margin: float  # of the column's score over that of the best column which names these bodies otherwise
    sacrum: float  # score of S1
    rival: float  # score of the strongest group that suggests another count, in [0, 1]

    def features(self) -> Float[np.ndarray, "3"]:
        """The margin, the log-odds of the sacrum and the rival's score, each about one between clear and doubtful."""
        score = np.clip(self.sacrum, _MIN_SCORE, _MAX_SCORE)
        margin = np.clip(self.margin, 0, MAX_MARGIN) / MAX_MARGIN
        return np.array([margin, np.log(score / (1 - score)) / 4, self.rival])


@dataclass(frozen=True)
class Calibration:
    """What was fitted to scans that the detectors had not seen.

    The defaults are for weights without a calibration. They doubt what shows a sacrum under 0.5 or a rival over 0.25.
    """

    level_weights: tuple[float, float, float] = (-4.0, -6.0, 12.0)  # of `Evidence.features`
    level_bias: float = -1.0
    corner_bias_mm: float = 1.0
    corner_slope: float = 1.0  # per mm of `Group.spread_mm`

    @classmethod
    def of(cls, provenance: dict[str, Any], member: int | None = None) -> "Calibration":
        """The calibration of all networks, or of one member, in the provenance of weights; or else the defaults.

        A member's is fitted without the patients that it has not seen either.
        """
        stored = provenance.get("calibrations", {})
        chosen = stored.get("all", {}) if member is None else stored.get("members", {member: {}})[member]
        return TypeAdapter(cls).validate_python(chosen)

    def level_doubt(self, evidence: Evidence | None) -> float:
        """The probability that a scan's levels are wrong; None means that no sacrum was seen."""
        if evidence is None:
            return NO_SACRUM
        logit = self.level_bias + float(np.dot(self.level_weights, evidence.features()))
        return float(1 / (1 + np.exp(-np.clip(logit, -30, 30))))

    def corner_mm(self, spread_mm: float) -> float:
        """A body's uncertainty: 90 % of the corners' errors are below twice it."""
        return self.corner_bias_mm + self.corner_slope * spread_mm
