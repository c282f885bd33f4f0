"""Mahalanobis' distance, against SciPy's and on a Gaussian whose distances are known."""

import numpy as np
from scipy.spatial.distance import mahalanobis
from scipy.stats import chi

from spinejax.metrics.usual import Usual


def test_the_distance_is_scipys():
    rng = np.random.default_rng(0)
    root = rng.normal(size=(4, 4))
    usual = Usual(rng.normal(size=4), root @ root.T, 1.0)
    features = rng.normal(size=(9, 4))
    expected = [mahalanobis(each, usual.mean, usual.precision) for each in features]
    np.testing.assert_allclose(usual.distance(features), expected)


def test_distances_of_a_gaussian_are_chi_distributed():
    rng = np.random.default_rng(1)
    root = rng.normal(size=(3, 3))
    features = rng.normal(size=(20000, 3)) @ root.T + 5
    found = Usual(np.full(3, 5.0), np.linalg.inv(root @ root.T), 1.0).distance(features)
    np.testing.assert_allclose(np.quantile(found, [0.5, 0.99]), chi(3).ppf([0.5, 0.99]), rtol=0.02)
