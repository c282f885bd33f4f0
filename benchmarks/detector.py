"""Speed and memory of detecting vertebral bodies in a raw scan: a phantom of clinical size.

    python -m benchmarks.detector [--rows 512 --columns 512 --slices 20] [--rounds 5]

It prints the seconds of the first scan, which compiles the network, the median of the following ones, and the process's
peak memory. It repeats this with a scan of another size, which must not compile again. The goals are 2 s and 600 MiB.
"""

import argparse
import time

import numpy as np
from rich.console import Console

from benchmarks.data_prep import peak_mib, resampled
from data_prep.detector.detect import detect
from data_prep.phantom.phantom import phantom


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.detector", description=__doc__.splitlines()[0])
    for name, size in (("rows", 512), ("columns", 512), ("slices", 20), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=size)
    options = parser.parse_args()
    drawn = phantom(0, 0).scan
    console = Console(width=120)
    for shape in ((options.rows, options.columns, options.slices), (384, 448, 15)):
        scan = resampled(drawn, shape, 1)
        seconds, found = [], None
        for _ in range(options.rounds + 1):
            start = time.perf_counter()
            found = detect(scan)
            seconds.append(time.perf_counter() - start)
        num_bodies = len(found.bodies)
        console.print(
            f"{shape[0]} × {shape[1]} × {shape[2]}: first {seconds[0]:.1f} s, then {np.median(seconds[1:]):.1f} s "
            f"(median of {options.rounds}), {num_bodies} bodies, peak {peak_mib():.0f} MiB",
            highlight=False,
        )


if __name__ == "__main__":
    main()
