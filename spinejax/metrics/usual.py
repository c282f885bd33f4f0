"""How far a disc is from those that a network learned from, by Mahalanobis' distance of its features."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class Usual(NamedTuple):
    """The features of the discs that a network learned from, as one Gaussian, and how far from it is unusual.

    Args:
        mean: of each feature.
        precision: the inverse of their covariance.
        threshold: a disc at a greater distance is unusual.
    """

    mean: Float[np.ndarray, "C"]
    precision: Float[np.ndarray, "C C"]
    threshold: float

    def distance(self, features: Float[np.ndarray, "N C"]) -> Float[np.ndarray, "N"]:
        """Mahalanobis' distance of each disc from the mean; 1 stands for one standard deviation."""
        off = features - self.mean
        return np.sqrt(np.einsum("ni,ij,nj->n", off, self.precision, off).clip(0))
