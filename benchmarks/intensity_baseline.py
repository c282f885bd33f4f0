"""A baseline without a network: a logistic regression on a few simple intensities of a disc.

All discs are cut to the same geometry: horizontal, centred, with an endplate's length of 112 of 320 columns. So fixed
boxes of the middle slice separate nucleus, annulus, endplates and bodies well enough for a baseline.
"""

from collections.abc import Mapping

import numpy as np

from benchmarks.running import peer
from spinejax.data.dataset import DataSet
from spinejax.geometry import INTENSITY_STEP, VOLUME_SHAPE
from spinejax.tasks import UNLABELLED

_CENTRE = np.array(VOLUME_SHAPE[:2]) // 2
_BAND_PX = 6  # a disc is about 25 px high
_NUM_BANDS = 13
_QUANTILES = (5, 25, 50, 75, 95)


def features(volume: np.ndarray) -> np.ndarray:
    """float64[36]. Mean and spread of thin bands from body to body; means of the disc's front, middle and back.

    Args:
        volume: uint16[192, 320, 15]; only its middle slice is used.
    """
    image = volume[:, :, VOLUME_SHAPE[2] // 2] * INTENSITY_STEP

    def box(rows: tuple[int, int], columns: tuple[int, int]) -> np.ndarray:
        (top, bottom), (left, right) = rows + _CENTRE[0], columns + _CENTRE[1]
        return image[top:bottom, left:right]

    first = -_NUM_BANDS * _BAND_PX // 2
    bands = [box((top, top + _BAND_PX), (-40, 40)) for top in first + _BAND_PX * np.arange(_NUM_BANDS)]
    thirds = [box((-8, 8), columns) for columns in ((-50, -17), (-17, 17), (17, 50))]
    nucleus = box((-8, 8), (-30, 30))
    return np.array(
        [
            *(band.mean() for band in bands),
            *(band.std() for band in bands),
            *(third.mean() for third in thirds),
            nucleus.std(),
            nucleus.mean() / max(0.5 * (bands[0].mean() + bands[-1].mean()), 1e-3),
            *np.percentile(nucleus, _QUANTILES),
        ]
    )


def all_features(data: DataSet) -> np.ndarray:
    """float64[N, 36]. The features of every disc of a data set."""
    return np.stack([features(data.volume(row)) for row in range(len(data))])


def probabilities(
    found: np.ndarray, labels: np.ndarray, num_grades: Mapping[str, int], train: np.ndarray
) -> dict[str, np.ndarray]:
    """Task name → float64[N, C]: probabilities from a class-balanced logistic regression for each task.

    A grade that no disc to learn from has gets none; if they all have the same, it is certain.

    Args:
        found: float64[N, F]. The features of all discs.
        labels: int[N, T], `UNLABELLED` where missing.
        num_grades: task name → C, in the order of the labels' columns.
        train: bool[N]. The discs to learn from.
    """
    make_pipeline = peer("sklearn.pipeline").make_pipeline
    classifier, scaler = peer("sklearn.linear_model").LogisticRegression, peer("sklearn.preprocessing").StandardScaler
    given = {}
    for column, (task, number) in enumerate(num_grades.items()):
        learned = train & (labels[:, column] != UNLABELLED)
        given[task] = np.zeros((len(found), number))
        if len(grades := np.unique(labels[learned, column])) < 2:
            given[task][:, grades] = 1
            continue
        regression = classifier(class_weight="balanced", max_iter=5000, C=0.1)
        model = make_pipeline(scaler(), regression).fit(found[learned], labels[learned, column])
        given[task][:, model.classes_] = model.predict_proba(found)
    return given


def majority(labels: np.ndarray, num_grades: Mapping[str, int], train: np.ndarray) -> dict[str, np.ndarray]:
    """Task name → float64[N, C]: for every disc, the most frequent grade of the training discs."""
    given = {}
    for column, (task, number) in enumerate(num_grades.items()):
        learned = labels[train, column]
        grade = np.bincount(learned[learned != UNLABELLED], minlength=number).argmax()
        given[task] = np.tile(np.eye(number)[grade], (len(labels), 1))
    return given
