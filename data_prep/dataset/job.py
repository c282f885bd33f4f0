"""A job: one scan that is to be cut into discs, and what its data set says of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from data_prep.anatomy.body_size import implausible_mask, implausible_size
from data_prep.anatomy.discs import DiscVolume, extract_discs, slices_per_slab
from data_prep.anatomy.vertebrae import VertebralBody, bodies_from_spider_mask, body_labels
from data_prep.read.scan import Scan
from spinejax.errors import SpinejaxError


@dataclass(frozen=True, eq=False)
class Located:
    """A scan with its vertebral bodies."""

    scan: Scan
    bodies: list[VertebralBody]
    notes: Sequence[str] = ()  # what is doubtful or was left out
    regions: Scan | None = None  # SPIDER's labels without posterior elements, if there is a mask
    lesions: Scan | None = None  # a bit per task where its evidence is, if that is known
    confidence: Mapping[str, float] | None = None  # of each body by name, if it was detected
    doubtful_levels: bool = False  # all names may be off by one
    corner_mm: Mapping[str, float] | None = None  # of each body that was detected, half of what its corners may be off

    @classmethod
    def by_mask(cls, scan: Scan, mask: Scan, *, notes: Sequence[str] = (), lesions: Scan | None = None) -> "Located":
        """The bodies of a mask in SPIDER's convention. Raises SpinejaxError: see `bodies_from_spider_mask`."""
        try:
            bodies, left_out = bodies_from_spider_mask(mask)
        except SpinejaxError as error:
            raise SpinejaxError(f"{error}{implausible_mask(mask)}") from error
        regions = Scan(body_labels(mask), mask.affine, mask.name)
        return cls(scan, bodies, [*notes, *left_out], regions, lesions)


class Examination(NamedTuple):
    """When a scan was made, of a patient who has several; never the date itself."""

    number: int  # from 1, in the order of time
    days: int | None  # since the first; None where dates are not known, and the order is that of the names


@dataclass(frozen=True)
class Job:
    """One scan to be cut into discs. `patient` and `scan` are pseudonyms."""

    name: str  # for messages; it enters no file of the data set
    patient: str
    scan: str
    split: str
    labels: Mapping[str, Mapping[str, int]]  # level → task → label; a level that is missing is unlabelled
    locate: Callable[[], Located]  # reads the scan and finds its bodies, or raises SpinejaxError; picklable
    sources: tuple[Path, ...] = ()  # the files that `locate` reads
    recipe: str = ""  # everything else that `locate` depends on
    per_disc: bool = False  # normalise each disc by one median, instead of each slice by its own
    native_slices: bool = False  # do not average thin slices
    refuse_doubtful: bool = False  # leave the scan out if its levels are doubtful
    source: str = ""  # the public data set that it comes from
    contrast: str = ""  # as of `data_prep.read.contrast`
    examination: Examination | None = None  # None for a patient's only scan

    def cut(self) -> tuple[list[DiscVolume], list[str]]:
        """The scan's disc volumes, and notes on what is doubtful or was left out. Raises SpinejaxError: as `locate`."""
        found = self.locate()
        notes = list(found.notes)
        if self.refuse_doubtful and found.doubtful_levels:
            return [], [*notes, f"left out: {self.name}: its levels are doubtful, so labels may be of the wrong discs."]
        per_slab = 1 if self.native_slices else slices_per_slab(found.scan)
        if doubt := implausible_size(found.scan, found.bodies):
            if per_slab > 1:
                raise SpinejaxError(
                    f"{doubt} Every {per_slab} slices would be averaged. Correct the header; or `data_prep scans "
                    "--slices native` keeps the slices as they are."
                )
            notes.append(doubt)
        discs = extract_discs(
            found.scan,
            found.bodies,
            regions=found.regions,
            lesions=found.lesions,
            per_disc=self.per_disc,
            native_slices=self.native_slices,
            notes=notes,
        )
        if per_slab > 1:
            slice_mm = found.scan.spacing_mm[2]
            notes.append(
                f"{self.name}: its slices are {slice_mm:.2f} mm apart; every {per_slab} were averaged into a slab of "
                f"{per_slab * slice_mm:.1f} mm."
            )
        return discs, notes
