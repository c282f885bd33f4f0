"""Discs unlike those that a network learned from, told by how they look.

A disc's features are 40 numbers: in parts of its window, how bright it is, and how much detail of three sizes it shows.
A disc is unusual if these are farther from those of the training discs (Mahalanobis' distance) than nearly all discs
are that are like these, but that the network has not learned from. An unusual disc is graded all the same: its grades
deserve a second look.

The same distance of the trunk's output, low confidence and the spread of the views tell fewer of these discs:
`benchmarks.unusual` compares them.
"""

import itertools

import numpy as np
from jaxtyping import Float, Integer, UInt16
from scipy import ndimage

from spinejax.data.dataset import DataSet
from spinejax.errors import needs
from spinejax.geometry import INTENSITY_STEP, central_window
from spinejax.metrics.usual import Usual

USUAL_SHARE = 0.99
"""Share of the unseen discs of `fit` that are not unusual."""

_SIGMAS_PX = (1, 2, 4)
"""Blurs whose differences are details of three sizes."""
_BRIGHTNESS_PARTS, _DETAIL_PARTS = (4, 4), (2, 4)
"""Parts of a window along its rows and columns."""
_DARKEST, _LEAST_DETAIL = 0.02, 1e-6  # so that the logarithm of black is finite, and not far from that of nearly black


def fit(
    data: DataSet,
    learned: Integer[np.ndarray, "M"] | None = None,
    unseen: Integer[np.ndarray, "K"] | None = None,
) -> Usual:
    """What is usual for a network, from the discs that it learned from and others like them.

    Args:
        data: the data set that it was trained on.
        learned: rows of the discs that give mean and covariance, which is shrunk as by Ledoit and Wolf (2004). Default:
            the train split.
        unseen: rows of discs that it has not learned from; `USUAL_SHARE` of them are within the threshold. Default: the
            validation split.

    Raises:
        SpinejaxError: scikit-learn is not installed, or a split is empty.
    """
    with needs("Fitting what is usual for a network needs scikit-learn", "scans"):
        from sklearn.covariance import LedoitWolf
    gaussian = LedoitWolf().fit(features(data, data.rows("train") if learned is None else learned))
    usual = Usual(gaussian.location_, gaussian.precision_, np.inf)
    others = features(data, data.rows("validation") if unseen is None else unseen)
    return usual._replace(threshold=float(np.quantile(usual.distance(others), USUAL_SHARE)))


def features(data: DataSet, rows: Integer[np.ndarray, "M"]) -> Float[np.ndarray, "M 40"]:
    """The features of some rows of a data set, at least one."""
    return np.stack([features_of(data.volume(row)) for row in rows])


def features_of(volume: UInt16[np.ndarray, "192 320 15"]) -> Float[np.ndarray, "40"]:
    """The features of one disc: logarithms of brightness and of the energy of detail, averaged over its slices."""
    window = central_window(volume)
    inside = window.any((0, 1))
    slices = window[:, :, inside if inside.any() else slice(None)] * INTENSITY_STEP
    blurs = [slices, *(ndimage.gaussian_filter(slices, (sigma, sigma, 0), truncate=2) for sigma in _SIGMAS_PX)]
    brightness = np.log(_DARKEST + _parts(slices, _BRIGHTNESS_PARTS).mean((1, 3)))
    details = [_parts(sharp - blurred, _DETAIL_PARTS) for sharp, blurred in itertools.pairwise(blurs)]
    energies = [np.log(_LEAST_DETAIL + np.square(detail).mean((1, 3))) for detail in details]
    found = np.concatenate([each.reshape(-1, slices.shape[2]) for each in (brightness, *energies)])
    return found.mean(1, dtype=np.float64)


def _parts(slices: Float[np.ndarray, "H W S"], number: tuple[int, int]) -> Float[np.ndarray, "R h C w S"]:
    """Slices cut into so many parts along rows and columns, of h × w pixels each."""
    (rows, columns), (height, width, _) = number, slices.shape
    return slices.reshape(rows, height // rows, columns, width // columns, -1)
