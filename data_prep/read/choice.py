"""Which parts of a DICOM series are read, and why the others are not."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_prep.read.csv_tables import some
from data_prep.read.parts import MAX_STRAYS, Part, nearest_mm, step_mm
from data_prep.read.scan import MAX_OFF_SAGITTAL_DEG, NotSagittalError, refuse_non_sagittal
from data_prep.read.stacks import SAME_MM, in_order
from spinejax.errors import SpinejaxError

_LOCALISER_STEP_MM = 10  # slices farther apart are no scan of discs


@dataclass(frozen=True)
class Judgement:
    """Why a part is not read: left out, or failed. Neither, if it is read."""

    left_out: str = ""
    failed: str = ""
    notes: tuple[str, ...] = ()


def judge(parts: Sequence[Part], name: str, names: Sequence[str], weighting: str) -> list[Judgement]:
    """A judgement on each part of a series.

    Args:
        parts: all of them.
        name: of the series, for messages.
        names: of the parts.
        weighting: "t2", "t1" or "any".
    """
    judged = [_judge(part, parts, own, weighting) for part, own in zip(parts, names, strict=True)]
    fit = [place for place, one in enumerate(judged) if not one.left_out and not one.failed]
    same = [place for place in fit if any(_same_places(parts[place], parts[other]) for other in fit if other != place)]
    if same and weighting != "any":
        which = some([parts[place].suffix for place in same], 8)
        reason = (
            f"{name}: its parts {which} show the same places, and each may be {weighting}. Choose one in an inventory, "
            "or read all with --weighting any."
        )
        for place in same:
            judged[place] = Judgement(failed=reason)
    return judged


def _judge(part: Part, parts: Sequence[Part], name: str, weighting: str) -> Judgement:
    contrast = part.contrast
    times = f" ({part.contrast.header})" if part.contrast.header else ""
    if part.derived:
        total = sum(len(other.frames) for other in parts)
        return Judgement(left_out=f"{len(part.frames)} of {total} images: {part.derived}")
    if reason := _stray(part, parts):
        return Judgement(left_out=reason)
    if part.plane == "sagittal" and (apart_mm := step_mm(part.frames)) >= _LOCALISER_STEP_MM:
        return Judgement(left_out=f"a localiser: its {len(part.frames)} slices are {apart_mm:.0f} mm apart")
    off_deg = min(np.degrees(np.arccos(np.clip(abs(frame.normal[0]), 0, 1))) for frame in part.frames)
    if off_deg > MAX_OFF_SAGITTAL_DEG:  # axial images are often in blocks, each along its disc: they make no volume
        article = "an" if part.plane == "axial" else "a"
        return Judgement(left_out=f"{article} {part.plane} series, {off_deg:.0f}° or more off the sagittal plane")
    if weighting != "any" and contrast.names and weighting not in contrast.names:
        return Judgement(left_out=f"{contrast.source()}, {weighting} was asked for" + times)
    if weighting != "any" and contrast.contradictory:
        question = f"is it {weighting}, as was asked for? Choose it in an inventory, or read it with --weighting any."
        return Judgement(failed=f"{name}: {contrast.source()}: {question}")
    try:
        frames, affine = in_order(part.frames, name)
        refuse_non_sagittal((*frames[0].shape, len(frames)), affine, name)
    except NotSagittalError as error:
        return Judgement(left_out=str(error).removeprefix(f"{name}: "))
    except SpinejaxError as error:
        return Judgement(failed=str(error))
    notes = []
    if "secondary" in part.frames[0].kind.image_type[:2]:
        notes.append(f"{name}: its images are SECONDARY by their ImageType: made from others")
    if weighting != "any" and (contrast.remarks or len(contrast.names) != 1):
        notes.append(f"{name}: {contrast.source() if contrast.names else 'its header does not tell its contrast'}")
    return Judgement(notes=tuple(notes))


def _stray(part: Part, parts: Sequence[Part]) -> str:
    """Why a part is only a few images beside a stack, or one of many that are none; or ""."""
    largest = max(len(other.frames) for other in parts if not other.derived)
    if len(part.frames) <= MAX_STRAYS and 4 * len(part.frames) <= largest:
        names = ", ".join(sorted({frame.path.name for frame in part.frames}))
        return f"{len(part.frames)} of another kind than the other {largest} images ({names})"
    if largest <= MAX_STRAYS and len(parts) > MAX_STRAYS:
        return f"its {len(parts)} images differ in orientation, size or echo time: projections or single images"
    return ""


def _same_places(one: Part, other: Part) -> bool:
    """Whether half of a part's images, or more, are where those of another part are."""
    return bool(np.mean(nearest_mm(one.frames, other.frames) < 10 * SAME_MM) >= 0.5)
