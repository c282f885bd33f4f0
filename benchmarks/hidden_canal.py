"""Accuracy of corners from masks without a spinal canal.

Canal and discs are removed from masks, as in those of TotalSegmentator. For each body it measures how far its worst
corner is from the one found with the canal.

    python -m benchmarks.hidden_canal SPIDER/masks            # SPIDER's masks
    python -m benchmarks.hidden_canal --phantoms 40           # synthetic ones, of whole bodies with pedicles

Neither check is independent: the T2 SPACE stacks of docs/data.md served to choose the thresholds in
`data_prep/anatomy/posterior_wall.py`, and a fault that the phantoms showed was fixed before the measurement.
"""

import argparse
from pathlib import Path

import numpy as np

from data_prep.anatomy.mask_labels import to_spider
from data_prep.anatomy.vertebrae import SPIDER_VERTEBRAE, bodies_from_spider_mask
from data_prep.phantom.phantom import phantom
from data_prep.read.metaimage import read_mha
from data_prep.read.scan import Scan
from spinejax.errors import SpinejaxError


def worst_corners_mm(mask: Scan) -> list[float]:
    """For each body found with the canal, the distance of its worst corner without it; infinite if it is not found."""
    seen, _ = bodies_from_spider_mask(mask)
    vertebrae = np.isin(mask.voxels, list(SPIDER_VERTEBRAE.values()))
    hidden = Scan(np.where(vertebrae, mask.voxels + 1, 0).astype(np.uint8), mask.affine, mask.name)
    try:
        bodies, _ = bodies_from_spider_mask(to_spider(hidden, "totalsegmentator", None)[0])
    except SpinejaxError as error:
        print(f"{mask.name}: {error}")
        bodies = []
    found = {body.name: body.corners for body in bodies}
    worst = []
    for body in seen:
        if body.name in found:
            apart = (body.corners - found[body.name]) * mask.spacing_mm[:2]
            worst.append(float(np.nanmax(np.linalg.norm(apart, axis=1))))
        elif body.name != "S1":
            worst.append(np.inf)
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hidden_canal", description=__doc__.splitlines()[0])
    parser.add_argument("masks", type=Path, nargs="?")
    parser.add_argument("--phantoms", type=int, default=0)
    options = parser.parse_args()
    masks = [read_mha(path, np.uint8) for path in sorted(options.masks.glob("*_SPACE.mha"))] if options.masks else []
    masks += [phantom(1, patient).mask for patient in range(options.phantoms)]
    worst = np.concatenate([worst_corners_mm(mask) for mask in masks])
    found = worst[np.isfinite(worst)]
    spread = ", ".join(f"{part} % within {np.percentile(found, part):.2f} mm" for part in (50, 75, 90, 95, 100))
    print(f"{len(masks)} masks, {len(worst)} bodies: {spread}; {np.sum(found > 3)} over 3 mm; "
          f"{np.sum(~np.isfinite(worst))} not found")  # fmt: skip


if __name__ == "__main__":
    main()
