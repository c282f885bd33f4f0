"""Fuzzing of the readers: every mutated file of every format must give a scan or a SpinejaxError.

    python -m benchmarks.fuzz_readers --cases 5000 --seed 0

A case is a fault if another exception is raised, the process crashes, it takes over 10 s, or it needs over 2 GiB. Cases
run in a child process. If a case kills it, a new one continues with the next case. Exit status 1 if there was a fault.
"""

import argparse
import gzip
import os
import resource
import signal
import subprocess
import sys
import tempfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np

MAX_SECONDS, MAX_BYTES = 10, 2 << 30
DICOM_FORMATS = ("dicom", "rle", "jpeg-ls", "jpeg2000", "jpeg-lossless", "deflate", "enhanced", "bare")
FORMATS = ("mha", "mha.zlib", "nii", "nii.gz", "nrrd", "nrrd.gz", *DICOM_FORMATS)
INTERESTING = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def seeds(folder: Path) -> dict[str, list[Path]]:
    """The files of one small valid scan in every format."""
    import pydicom
    import SimpleITK

    from data_prep.read.metaimage import write_mha
    from data_prep.read.nifti import write_nifti
    from data_prep.read.scan import Scan
    from tests.block_spine import sagittal_affine
    from tests.dicom_files import enhanced, pack_as_jpeg_lossless, save, series

    voxels = np.random.default_rng(0).permutation(40 * 36 * 4).reshape(40, 36, 4).astype(np.float32)
    scan = Scan(voxels, sagittal_affine((0.8, 0.7, 4.0), (7.0, -5.0)), "scan")
    write_mha(folder / "s.mha", scan)
    write_nifti(folder / "s.nii.gz", scan)
    (folder / "s.nii").write_bytes(gzip.decompress((folder / "s.nii.gz").read_bytes()))
    packed = (folder / "s.mha").read_bytes()
    header, _, data = packed.partition(b"ElementDataFile = LOCAL\n")
    lines = [line for line in header.splitlines() if not line.startswith(b"Compressed")]
    (folder / "p.mha").write_bytes(b"\n".join([*lines, b"ElementDataFile = LOCAL\n"]) + zlib.decompress(data))
    found = {"mha": [folder / "p.mha"], "mha.zlib": [folder / "s.mha"], "nii": [folder / "s.nii"]}
    found |= {"nii.gz": [folder / "s.nii.gz"], "nrrd": [folder / "s.nrrd"], "nrrd.gz": [folder / "p.nrrd"]}
    for name, compressed in (("nrrd", False), ("nrrd.gz", True)):
        SimpleITK.WriteImage(SimpleITK.ReadImage(str(folder / "s.mha")), str(found[name][0]), compressed)
    syntaxes = {"rle": pydicom.uid.RLELossless, "jpeg-ls": pydicom.uid.JPEGLSLossless}
    syntaxes |= {"jpeg2000": pydicom.uid.JPEG2000Lossless}
    for name in DICOM_FORMATS:
        slices = series(folder / name, scan)
        if name in syntaxes:
            for one in slices:
                one.compress(syntaxes[name], generate_instance_uid=False)
                save(one)
        elif name == "jpeg-lossless":
            for one in slices:
                pack_as_jpeg_lossless(one.filename, pydicom.uid.JPEGLosslessSV1)
        elif name == "deflate":
            for one in slices:
                one.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
                pydicom.dcmwrite(one.filename, one, implicit_vr=False, little_endian=True)
        elif name == "bare":
            for one in slices:
                bare = pydicom.Dataset(one)
                pydicom.dcmwrite(one.filename, bare, implicit_vr=True, little_endian=True, enforce_file_format=False)
        elif name == "enhanced":
            (folder / "whole").mkdir()
            save(enhanced(slices), folder / "whole" / "e")
        found[name] = [folder / "whole" / "e"] if name == "enhanced" else sorted((folder / name).iterdir())
    return found


def mutate(data: bytes, rng: np.random.Generator, head: int) -> bytes:
    """Make one to four changes, half of them in the first `head` bytes, which are the header."""
    mutated = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        reach = min(head, len(mutated)) if rng.random() < 0.5 else len(mutated)
        place = int(rng.integers(max(reach, 1)))
        kind = rng.integers(7)
        if kind == 0:
            mutated[place : place + 1] = bytes([rng.integers(256)])
        elif kind == 1:
            value, size = INTERESTING[rng.integers(len(INTERESTING))], int(rng.choice([1, 2, 4]))
            mutated[place : place + size] = (value & (256**size - 1)).to_bytes(size, rng.choice(["little", "big"]))
        elif kind == 2:
            del mutated[place:]
        elif kind == 3:
            del mutated[place : place + int(rng.integers(1, 64))]
        elif kind == 4:
            mutated[place:place] = mutated[place : place + int(rng.integers(1, 64))]
        elif kind == 5:
            mutated[place:place] = rng.bytes(int(rng.integers(1, 64)))
        else:  # another number in a text header
            digits = [index for index in range(min(head, len(mutated))) if chr(mutated[index]).isdigit()]
            if digits:
                index = digits[rng.integers(len(digits))]
                mutated[index : index + 1] = rng.choice(["-", "9", "0", "e9", "999999999", ".", "nan"]).encode()
    return bytes(mutated)


def run_case(number: int, seed: int, found: dict[str, list[Path]], folder: Path) -> str:
    """Mutate one file of one format, read the scan, and return how it ended."""
    from data_prep.read.series import find_series
    from spinejax.errors import SpinejaxError

    rng = np.random.default_rng([seed, number])
    name = FORMATS[number % len(FORMATS)]
    files = found[name]
    chosen = int(rng.integers(len(files)))
    for path in folder.iterdir():
        path.unlink()
    for index, path in enumerate(files):
        data = path.read_bytes()
        if index == chosen and name == "nii.gz" and rng.random() < 0.5:
            data = gzip.compress(mutate(gzip.decompress(data), rng, 352), 1)
        elif index == chosen:
            data = mutate(data, rng, 1500 if name in DICOM_FORMATS else 400)
        (folder / path.name).write_bytes(data)
    try:
        series = find_series([folder], weighting="any")
        for one in series.series:
            one.read()
        return "scan" if series.series else "told"
    except SpinejaxError:
        return "told"


def child(first: int, cases: int, seed: int) -> None:
    """Run cases from `first` on. Each is printed before it starts, so the last one printed killed the process."""
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "seeds").mkdir()
        (Path(place) / "case").mkdir()
        found = seeds(Path(place) / "seeds")
        for number in range(first, cases):
            print(number, "starts", flush=True)
            signal.alarm(MAX_SECONDS)
            try:
                ending = run_case(number, seed, found, Path(place) / "case")
            except BaseException as error:
                ending = f"FAULT {type(error).__name__}: {error}"
            signal.alarm(0)
            if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 > MAX_BYTES:
                print(number, "FAULT memory", flush=True)
                os._exit(3)
            print(number, ending.replace("\n", " ")[:300], flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz_readers", description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--child", action="store_true")
    options = parser.parse_args()
    if options.child:
        child(options.first, options.cases, options.seed)
        return 0
    counts: Counter = Counter()
    faults, first = [], options.first
    while first < options.cases:
        command = [sys.executable, "-m", "benchmarks.fuzz_readers", "--child", "--first", str(first)]
        command += ["--cases", str(options.cases), "--seed", str(options.seed)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False)
        lines = done.stdout.splitlines()
        endings = {int(line.split()[0]): line.partition(" ")[2] for line in lines}
        for number, ending in endings.items():
            if ending == "starts":
                ending = f"FAULT killed by signal {-done.returncode}"
            if ending.startswith("FAULT"):
                faults.append(f"case {number} ({FORMATS[number % len(FORMATS)]}): {ending}")
            counts[FORMATS[number % len(FORMATS)], ending.split()[0]] += 1
        if not endings:
            print("the child does not start")
            return 1
        first = max(endings) + 1
    for name in FORMATS:
        print(f"{name:10}", *(f"{ending} {counts[name, ending]:5}" for ending in ("scan", "told", "FAULT")))
    print(*faults[:50], f"{len(faults)} faults in {options.cases - options.first} cases", sep="\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
