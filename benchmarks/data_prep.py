"""Speed and memory of cutting discs out of scans of clinical size, with masks, in one process.

    python -m benchmarks.data_prep [--scans 20] [--rows 512 --columns 512 --slices 20] [--out data_prep.json]

For each format it prints the seconds per scan (reading, finding corners, cutting), the scans per minute and core, and
the process's peak memory after the first and after the last scan. The two are equal if memory does not grow with the
scans.
"""

import argparse
import json
import resource
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console
from scipy import ndimage

from data_prep.anatomy.discs import extract_discs
from data_prep.phantom.phantom import phantom
from data_prep.phantom.write_dicom import write_dicom
from data_prep.read.metaimage import write_mha
from data_prep.read.nifti import write_nifti
from data_prep.read.scan import Scan
from data_prep.read.series import find_series
from data_prep.sources.scan_files import Cutting, locate


def resampled(scan: Scan, shape: tuple[int, int, int], order: int) -> Scan:
    """A scan with another number of voxels over the same field of view."""
    zoom = np.array(shape) / scan.voxels.shape
    affine = scan.affine @ np.diag([*(1 / zoom), 1])
    return Scan(ndimage.zoom(scan.voxels, zoom, order=order, grid_mode=True, mode="nearest"), affine, scan.name)


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data_prep", description=__doc__.splitlines()[0])
    parser.add_argument("--scans", type=int, default=20)
    for name, size in (("rows", 512), ("columns", 512), ("slices", 20)):
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--out", type=Path, help="figures as JSON")
    options = parser.parse_args()
    figures = {}
    drawn = phantom(0, 0)
    shape = (options.rows, options.columns, options.slices)
    scan, mask = resampled(drawn.scan, shape, 1), resampled(drawn.mask, shape, 0)
    console = Console(width=200)
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        write_dicom(root / "dicom" / "p", scan, patient="p", series="t2")
        for folder in ("mha", "nifti", "masks"):
            (root / folder).mkdir()
        write_mha(root / "mha" / "p_t2.mha", scan)
        write_nifti(root / "nifti" / "p_t2.nii.gz", scan)
        write_mha(root / "masks" / "mask.mha", mask)
        for name in ("mha", "nifti", "dicom"):
            work = partial(one_scan, root / name, root / "masks" / "mask.mha")
            num_discs = work()
            first_mib, start, cpu_start = peak_mib(), time.perf_counter(), time.process_time()
            for _ in range(options.scans):
                work()
            seconds = (time.perf_counter() - start) / options.scans
            cpu_seconds = (time.process_time() - cpu_start) / options.scans
            figures[name] = {
                "shape": shape,
                "scans": options.scans,
                "seconds_per_scan": seconds,
                "cpu_seconds_per_scan": cpu_seconds,
                "scans_per_minute_and_core": 60 / seconds,
                "peak_mib_after_first": first_mib,
                "peak_mib_after_last": peak_mib(),
            }
            console.print(
                f"{name:6} {shape}: {seconds:.2f} s ({cpu_seconds:.2f} of one core's) a scan of {num_discs} discs, "
                f"{60 / seconds:.0f} scans per minute and "
                f"core; peak {first_mib:.0f} MiB after one scan, {peak_mib():.0f} MiB after {options.scans + 1}",
                highlight=False,
            )
    if options.out:
        options.out.write_text(json.dumps(figures, indent=1) + "\n")


def one_scan(folder: Path, mask: Path) -> int:
    (series,) = find_series([folder]).series
    found = locate(series, mask, Cutting())
    return len(extract_discs(found.scan, found.bodies, regions=found.regions))


if __name__ == "__main__":
    main()
