"""A data set of discs that are cut out of block spines, with the pictures of the spines beside them."""

import numpy as np

from data_prep.anatomy.discs import extract_discs
from data_prep.dataset.job import Located
from data_prep.look.scan_picture import picture_of
from spinejax.data.manifest import write_manifest
from spinejax.data.scan_picture import write_scan_picture
from spinejax.data.shards import Disc, shard_name, write_shard
from spinejax.files import checksums
from tests.block_spine import block_spine
from tests.conftest import TASKS

SPINE = block_spine(spacing_mm=(1.1, 0.7, 4.0), angles_deg=(6.0, -4.0))


def write_spines(
    folder, *, scans=(("p0", "p0-t2"),), pictured=None, tasks=TASKS, unsure=None, spines=(SPINE,), known=()
):
    """One block spine a scan, given as (patient, scan); `pictured` are those with a picture, by default all.

    Args:
        folder: of the data set.
        scans: patients and scans, by pseudonym.
        pictured: those that have a picture; all by default.
        tasks: the task table.
        unsure: name of a body that was detected with little confidence, in levels that are doubtful.
        spines: the block spines, taken in turn.
        known: what the manifest tells of each scan: its examination, and the days since the first.
    """
    folder.mkdir(parents=True)
    located = [Located.by_mask(spine.scan, spine.mask) for spine in spines]
    if unsure:
        doubt = {"confidence": {unsure: 0.2}, "doubtful_levels": True}
        located = [Located(found.scan, found.bodies, **doubt) for found in located]
    found_in = {scan: located[number % len(located)] for number, (_, scan) in enumerate(scans)}
    discs = [
        Disc(
            disc.volume + np.uint16(number),  # one image is not two patients'
            disc.affine,
            disc.slices,
            {tasks[0].name: place % tasks[0].num_grades},
            disc.level,
            patient,
            scan,
            "test",
        )
        for number, (patient, scan) in enumerate(scans)
        for place, disc in enumerate(extract_discs(found_in[scan].scan, found_in[scan].bodies))
    ]
    examined = {scan: {"source": "", "contrast": "t2"} | told for (_, scan), told in zip(scans, known, strict=False)}
    also = {"scans": examined} if known else {}
    write_manifest(folder, [write_shard(folder / shard_name(0, 1), discs, tasks)], tasks, {}, (), also)
    for scan in [scan for _, scan in scans] if pictured is None else pictured:
        write_scan_picture(folder, scan, picture_of(found_in[scan]))
    checksums.seal(folder)
    return folder
