"""Speed and memory of cutting discs out of scans of clinical size, with masks, and of an inventory of many small files.

    python -m benchmarks.data_prep [--scans 20] [--rows 512 --columns 512 --slices 20] [--files 10000] [--out FILE]

For each format it prints the seconds per scan (reading, finding corners, cutting) in one process, the scans per minute
and core, and the process's peak memory after the first and after the last scan. The two are equal if memory does not
grow with the scans. Of the inventory it prints the seconds and the peak memory of the command with two workers, for a
tenth of the files and for all, and once more with the headers that were kept.
"""

import argparse
import os
import resource
import subprocess
import sys
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
from spinejax.files.json_files import write_json


def resampled(scan: Scan, shape: tuple[int, int, int], order: int) -> Scan:
    """A scan with another number of voxels over the same field of view."""
    zoom = np.array(shape) / scan.voxels.shape
    affine = scan.affine @ np.diag([*(1 / zoom), 1])
    return Scan(ndimage.zoom(scan.voxels, zoom, order=order, grid_mode=True, mode="nearest"), affine, scan.name)


FILES_OF_A_SERIES = 20
# A run of data_prep that ends with its peak memory and that of its largest worker, in KiB.
MEASURED = """
import re, resource, sys
from data_prep.__main__ import main
status = main(sys.argv[1:])
print(re.search("VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])  # ru_maxrss counts the parent's memory, too
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(status)
"""


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data_prep", description=__doc__.splitlines()[0])
    parser.add_argument("--scans", type=int, default=20)
    for name, size in (("rows", 512), ("columns", 512), ("slices", 20)):
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--files", type=int, default=10_000, help="DICOM files of the inventory")
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
    if options.files:
        with tempfile.TemporaryDirectory() as place:
            small = resampled(drawn.scan, (48, 32, FILES_OF_A_SERIES), 1)
            figures["inventory"] = inventories(Path(place), small, options.files, console)
    if options.out:
        write_json(options.out, figures)


def inventories(place: Path, scan: Scan, num_files: int, console: Console) -> list[dict]:
    """Time the command `inventory` on a tenth of some DICOM files, on all, and on all again."""
    figures = []
    done = 0
    for last, kept in ((num_files // 10, False), (num_files, False), (num_files, True)):
        for number in range(done, last, FILES_OF_A_SERIES):
            write_dicom(place / "files" / f"p{number}", scan, patient=f"p{number}", series="t2")
        done = last
        if not kept:
            (place / "inventory.headers.json").unlink(missing_ok=True)
        command = ["inventory", place / "files", "--out", place / "inventory.csv", "--overwrite", "--workers", "2"]
        start, before = time.perf_counter(), os.times()
        peaks = subprocess.run([sys.executable, "-c", MEASURED, *map(str, command)], capture_output=True, check=True)
        seconds, after = time.perf_counter() - start, os.times()
        cpu_seconds = after.children_user + after.children_system - before.children_user - before.children_system
        own, worker = (float(word) / 1024 for word in peaks.stdout.split()[-2:])
        figures.append(
            {
                "files": done,
                "headers_kept": kept,
                "workers": 2,
                "seconds": seconds,
                "cpu_seconds": cpu_seconds,
                "peak_mib": own,
                "peak_mib_of_largest_worker": worker,
            }
        )
        console.print(
            f"inventory of {done} files{' again' if kept else ''}, two workers: {seconds:.1f} s ({cpu_seconds:.1f} of "
            f"the cores'), peak {own:.0f} MiB, and {worker:.0f} MiB of the largest worker",
            highlight=False,
        )
    return figures


def one_scan(folder: Path, mask: Path) -> int:
    (series,) = find_series([folder]).series
    found = locate(series, mask, Cutting())
    return len(extract_discs(found.scan, found.bodies, regions=found.regions))


if __name__ == "__main__":
    main()
