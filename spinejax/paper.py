"""What Jamaludin, Kadir and Zisserman (MICCAI 2016) published, as data."""

TABLE_1 = {
    "pfirrmann": (3862, 1754, 2800, 2415, 1163),
    "narrowing": (7186, 1375, 2185, 1243),
    "upper_endplate": (10952, 1034),
    "lower_endplate": (10927, 1056),
    "upper_marrow": (10069, 1824),
    "lower_marrow": (10077, 1815),
}
"""Labelled discs per grade (Table 1), of 12,018 discs in all."""

NUM_DISCS = 12018

INTRA_RATER = {
    "pfirrmann": 70.4,
    "narrowing": 72.0,
    "upper_endplate": 80.7,
    "lower_endplate": 83.3,
    "upper_marrow": 92.5,
    "lower_marrow": 91.4,
}
"""Agreement of one radiologist with himself, average per-class accuracy in % (Table 2, "Intra-rater")."""

TABLE_2 = {
    None: ((69.8, 0.4), (72.3, 2.1), (79.0, 0.5), (79.5, 1.2), (88.1, 0.6), (87.3, 0.3)),
    "conv3": ((71.2, 1.0), (74.4, 0.4), (83.0, 1.5), (82.8, 1.5), (89.1, 0.1), (88.2, 0.7)),
    "conv4": ((70.9, 0.1), (73.3, 1.9), (81.7, 2.5), (84.5, 1.2), (89.2, 0.2), (88.9, 0.2)),
    "conv5": ((71.2, 0.4), (73.9, 0.7), (84.8, 0.6), (87.3, 2.3), (90.1, 0.4), (89.0, 0.4)),
    "fc6": ((69.8, 0.4), (73.2, 0.1), (85.8, 0.3), (85.8, 2.0), (89.2, 0.3), (88.5, 0.8)),
    "fc7": ((70.9, 0.6), (74.5, 0.7), (85.7, 0.1), (86.4, 2.0), (89.2, 0.5), (88.2, 0.7)),
}
"""Average per-class accuracy in % by branch point: (mean, standard deviation), in `INTRA_RATER`'s order (Table 2)."""


def table_2(branch_point: str | None) -> dict[str, tuple[float, float]]:
    """Table 2's column for one branch point: task name → (mean, standard deviation) in %."""
    return dict(zip(INTRA_RATER, TABLE_2[branch_point], strict=True))
