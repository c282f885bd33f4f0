"""A job: one scan that is to be cut into discs, and what its data set says of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.anatomy.discs import DiscVolume, extract_discs
from data_prep.anatomy.vertebrae import VertebralBody, bodies_from_spider_mask, body_labels
from data_prep.read.scan import Scan


@dataclass(frozen=True, eq=False)
class Located:
    """A scan with its vertebral bodies.

    Args:
        scan, bodies: the scan and the bodies that were found in it.
        notes: what is doubtful or was left out, a sentence each.
        regions: SPIDER's labels without posterior elements, if there is a mask.
        lesions: a bit per task where its evidence lies, if that is known.
        confidence: name → confidence of each body that was detected; None for a mask or a corner file.
        doubtful_levels: whether all names may be off by one.
    """

    scan: Scan
    bodies: list[VertebralBody]
    notes: Sequence[str] = ()
    regions: Scan | None = None
    lesions: Scan | None = None
    confidence: Mapping[str, float] | None = None
    doubtful_levels: bool = False

    @classmethod
    def by_mask(cls, scan: Scan, mask: Scan, *, notes: Sequence[str] = (), lesions: Scan | None = None) -> "Located":
        """The bodies of a mask in SPIDER's convention. Raises SpinejaxError: see `bodies_from_spider_mask`."""
        bodies, left_out = bodies_from_spider_mask(mask)
        regions = Scan(body_labels(mask), mask.affine, mask.name)
        return cls(scan, bodies, [*notes, *left_out], regions, lesions)


@dataclass(frozen=True)
class Job:
    """One scan to be cut into discs.

    Args:
        name: the scan's name in messages. It enters no file of the data set.
        patient, scan: pseudonyms.
        split: "train", "validation" or "test".
        labels: level → task → label. A level that is missing is unlabelled.
        locate: reads the scan and finds its bodies; raises SpinejaxError if it cannot. Picklable.
        sources: the files that `locate` reads.
        recipe: a text of everything else that `locate` depends on.
        per_disc: normalise each disc by one median, instead of each slice by its own.
        refuse_doubtful: leave the scan out if its levels are doubtful.
    """

    name: str
    patient: str
    scan: str
    split: str
    labels: Mapping[str, Mapping[str, int]]
    locate: Callable[[], Located]
    sources: tuple[Path, ...] = ()
    recipe: str = ""
    per_disc: bool = False
    refuse_doubtful: bool = False

    def cut(self) -> tuple[list[DiscVolume], list[str]]:
        """The scan's disc volumes, and notes on what is doubtful or was left out. Raises SpinejaxError: as `locate`."""
        found = self.locate()
        notes = list(found.notes)
        if self.refuse_doubtful and found.doubtful_levels:
            return [], [*notes, f"left out: {self.name}: its levels are doubtful, so its labels may be of other discs."]
        discs = extract_discs(
            found.scan,
            found.bodies,
            regions=found.regions,
            lesions=found.lesions,
            per_disc=self.per_disc,
            notes=notes,
        )
        return discs, notes
