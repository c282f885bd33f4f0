"""One SeriesInstanceUID as the stacks of images in it: scanners put several echoes, stacks or repetitions into one.

Images that differ in kind, size, plane or echo time never make one scan. What else may tell images apart, such as the
number of their acquisition, parts a series only where it must and where each part is then a whole stack.
"""

import hashlib
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Float

from data_prep.read.contrast import Contrast
from data_prep.read.csv_tables import some
from data_prep.read.dicom import stored_pixels
from data_prep.read.dicom_headers import DicomFile, Frame
from data_prep.read.stacks import SAME_MM, in_order
from spinejax.errors import SpinejaxError

PLANES = ("sagittal", "coronal", "axial")  # by the axis, in LPS, along which slices are stacked
_SAME_ECHO = 1.05  # echo times of one contrast differ by less than this factor, if at all
_SAME_AXES = 0.02  # directions of one stack differ by less than this; a degree
_FEWEST_OF_A_SCAN, _CLOSE_MM = 8, 7.0  # of sagittal slices that are no localiser's
MAX_STRAYS = 2  # images of another plane or kind beside a stack; more are a localiser


@dataclass(frozen=True, eq=False)
class Part:
    """Images of one series that belong together."""

    suffix: str  # tells the parts of a series apart, "/TE100"; empty if it has one
    frames: tuple[Frame, ...]
    contrast: Contrast
    derived: str = ""  # what it is instead of a scan: "an ADC map by its ImageType", "a localiser in 3 planes"

    @property
    def plane(self) -> str:
        """The plane that is nearest to its slices."""
        return _plane(self.frames[0])


def without_copies(files: Sequence[DicomFile], name: str) -> tuple[list[DicomFile], list[str]]:
    """A series' files without those that are there twice, and a note on these.

    Raises:
        SpinejaxError: files of one SOPInstanceUID differ in their place or their pixels.
    """
    by_instance: dict[str, list[DicomFile]] = defaultdict(list)
    for file in files:
        by_instance[file.instance or str(file.path)].append(file)
    copies = 0
    for first, *others in by_instance.values():
        for other in others:
            if not _same_image(first, other):
                raise SpinejaxError(
                    f"{name}: {first.path} and {other.path} have one SOPInstanceUID but differ. Keep the right one."
                )
            copies += 1
    note = f"{name}: {copies} files are there twice and were read once"
    return [first for first, *_ in by_instance.values()], [note] * bool(copies)


def _same_image(one: DicomFile, other: DicomFile) -> bool:
    if one.path.read_bytes() == other.path.read_bytes():
        return True
    if len(one.frames) != len(other.frames) or not one.frames or one.patient != other.patient:
        return False
    return all(
        first.shape == second.shape and _apart_mm(first, second) < SAME_MM and _same_pixels(first, second)
        for first, second in zip(one.frames, other.frames, strict=True)
    )


def _same_pixels(one: Frame, other: Frame) -> bool:
    pixels = [stored_pixels(frame.path, frame.shape)[0][frame.index] for frame in (one, other)]
    scales = (one.slope, one.intercept), (other.slope, other.intercept)
    return scales[0] == scales[1] and np.array_equal(*pixels)


def parts_of(frames: Sequence[Frame], name: str) -> tuple[list[Part], list[str]]:
    """The parts of a series, in an order that does not depend on its files' names, and notes.

    Args:
        frames: its images that have a place in the patient.
        name: for the notes.
    """
    groups = {f"/{kind}" if kind else "": group for kind, group in _by(_kinds(frames), frames).items()}
    for label in (_planes, _sizes, _echoes):
        groups = {
            suffix + (f"/{end}" if end else ""): members
            for suffix, group in groups.items()
            for end, members in (_by(label(group), group) if _worth_parting(group) else {"": group}).items()
        }
    notes = []
    whole: dict[str, list[Frame]] = {}
    for suffix, group in groups.items():
        stacks = _repetitions(group) if _worth_parting(group) else {"": group}
        if len(stacks) == 1 and _worth_parting(group) and not _is_stack(group):
            kept = _without_same_pixels(group)
            if len(kept) < len(group):
                notes.append(f"{name}: {len(group) - len(kept)} images are there twice, and were read once")
                stacks = _repetitions(kept)
        whole |= {suffix + end: stack for end, stack in stacks.items()}
    several_echoes = len([suffix for suffix in whole if "/TE" in suffix]) > 1
    parts = []
    for suffix, stack in sorted(whole.items()):
        contrast = stack[0].kind.contrast
        if several_echoes and contrast.contradictory:  # a description cannot speak for each
            contrast = replace(contrast, by_words="")
        parts.append(Part(suffix, tuple(stack), contrast, stack[0].kind.derived or _localiser(stack)))
    if len(parts) > 1:
        told = some([f"{len(part.frames)} images {part.suffix}" for part in parts], 8)
        notes.append(f"{name}: has {len(parts)} parts: {told}")
    return parts, notes


def _worth_parting(frames: Sequence[Frame]) -> bool:
    """Whether images may hold a scan: derived ones and those of another plane are left out as one part."""
    acquired = not frames[0].kind.derived and not _localiser(frames)
    return acquired and any(_plane(frame) == "sagittal" for frame in frames)


def _localiser(frames: Sequence[Frame]) -> str:
    """Why images are a localiser: sagittal ones and others, each of any number; or "".

    Many sagittal slices close to each other are a scan, to which an archive or an anonymiser has added others.
    """
    planes = Counter(map(_plane, frames))
    sagittal = [frame for frame in frames if _plane(frame) == "sagittal"]
    if len(sagittal) >= _FEWEST_OF_A_SCAN and step_mm(sagittal) < _CLOSE_MM:
        return ""
    elsewhere = len(frames) - planes["sagittal"]
    if planes["sagittal"] and elsewhere and (elsewhere > MAX_STRAYS or 4 * elsewhere > planes["sagittal"]):
        return f"a localiser in {len(planes)} planes ({', '.join(sorted(planes))})"
    return ""


def _by(labels: Iterable[str], frames: Sequence[Frame]) -> dict[str, list[Frame]]:
    groups: dict[str, list[Frame]] = defaultdict(list)
    for label, frame in zip(labels, frames, strict=True):
        groups[label].append(frame)
    return {"": list(frames)} if len(groups) == 1 else dict(sorted(groups.items()))


# What always parts a series -------------------------------------------------------------------------------------------


def _kinds(frames: Sequence[Frame]) -> list[str]:
    """By what the images show: derived ones of each kind, and what a Dixon sequence computes."""
    kinds = ["-".join(frame.kind.derived.partition(" by ")[0].split()[1:]) for frame in frames]
    return [kind or frame.kind.contrast.dixon for kind, frame in zip(kinds, frames, strict=True)]


def _planes(frames: Sequence[Frame]) -> list[str]:
    """By plane, and sagittal ones by orientation: "sagittal", or "sagittal1" and "sagittal2"."""

    def same(one: Frame, other: Frame) -> bool:
        if _plane(one) == _plane(other) != "sagittal":
            return True
        return bool(abs(one.axes - other.axes).max() < _SAME_AXES)

    turned = _clusters(frames, same)
    planes = [_plane(group[0]) for group in turned]
    numbers = [f"{planes[: place + 1].count(plane)}" * (planes.count(plane) > 1) for place, plane in enumerate(planes)]
    of = {id(frame): f"{planes[n]}{numbers[n]}" for n, group in enumerate(turned) for frame in group}
    return [of[id(frame)] for frame in frames]


def _sizes(frames: Sequence[Frame]) -> list[str]:
    """By pixels and their size."""
    return ["x".join([*map(str, frame.shape), *(f"{mm:.3g}mm" for mm in frame.spacing_mm)]) for frame in frames]


def _echoes(frames: Sequence[Frame]) -> list[str]:
    """By echo time."""
    times = sorted({frame.kind.echo_ms for frame in frames})
    breaks = [late for early, late in itertools.pairwise(times) if late > _SAME_ECHO * early]
    return [f"TE{max([times[0], *(t for t in breaks if t <= frame.kind.echo_ms)]):g}" for frame in frames]


def _clusters(frames: Sequence[Frame], same: Callable[[Frame, Frame], bool]) -> list[list[Frame]]:
    """Groups of frames that are the same as their group's first."""
    groups: list[list[Frame]] = []
    for frame in sorted(frames, key=lambda frame: (*frame.axes.ravel().round(3), *frame.position_mm.round(2))):
        group = next((group for group in groups if same(group[0], frame)), None)
        if group is None:
            groups.append([frame])
        else:
            group.append(frame)
    return groups


# What parts a series where it must ------------------------------------------------------------------------------------


def _repetitions(frames: Sequence[Frame]) -> dict[str, list[Frame]]:
    """The whole stacks of images that do not make one, by whatever tells them apart; or else the images as they are."""
    if _is_stack(frames):
        return {"": list(frames)}
    names = dict.fromkeys(name for frame in frames for name, _ in frame.kind.repeats)
    ways: list[tuple[str, list[str]]] = [("stack", [frame.kind.stack for frame in frames])]
    ways += [(name, [dict(frame.kind.repeats).get(name, "") for frame in frames]) for name in names]
    ways += [("", ["-".join(frame.kind.image_type) for frame in frames]), ("place", _places(frames))]
    ways += [("", ["-or-".join(frame.kind.contrast.names) for frame in frames])]
    for name, values in ways:
        groups = _by(values, frames)
        whole = all(map(_is_stack, groups.values())) and (name == "stack" or not _interleaved(groups))
        if len(groups) > 1 and (whole or _with_strays(groups)):
            return {f"/{name}{value}": group for value, group in groups.items()}
    return {"": list(frames)}


def _with_strays(groups: dict[str, list[Frame]]) -> bool:
    """Whether there are a stack and, at the places of its slices, a few other images."""
    *others, stack = sorted(groups.values(), key=len)
    strays = [frame for group in others for frame in group]
    few = len(strays) <= MAX_STRAYS and 4 * len(strays) <= len(stack)
    return few and _is_stack(stack) and bool((nearest_mm(strays, stack) < SAME_MM).all())


def _is_stack(frames: Sequence[Frame]) -> bool:
    try:
        in_order(frames, "")
    except SpinejaxError:
        return False
    return len(frames) > 1


def _places(frames: Sequence[Frame]) -> list[str]:
    """By the line along which slices are stacked: upper and lower stacks of a spine differ in it."""

    def same_line(one: Frame, other: Frame) -> bool:
        apart = other.position_mm - one.position_mm
        return bool(np.linalg.norm(apart - one.normal * (apart @ one.normal)) < one.spacing_mm.max())

    lines = _clusters(frames, same_line)
    of = {id(frame): str(number) for number, group in enumerate(lines, start=1) for frame in group}
    return [of[id(frame)] for frame in frames]


def _interleaved(groups: dict[str, list[Frame]]) -> bool:
    """Whether slices of one group lie between those of another, in one line: halves of one stack with a gap."""
    for one, other in itertools.combinations(groups.values(), 2):
        here, there = (np.array([frame.position_mm @ one[0].normal for frame in group]) for group in (one, other))
        overlap = here.min() <= there.max() and there.min() <= here.max()
        if overlap and nearest_mm(one, other).min() > SAME_MM and len(set(_places([*one, *other]))) == 1:
            return True
    return False


def _without_same_pixels(frames: Sequence[Frame]) -> list[Frame]:
    """The frames without those that have the place and the pixels of another."""
    of_file: dict[Path, list[Frame]] = defaultdict(list)
    for frame in frames:
        of_file[frame.path].append(frame)
    alike: dict[bytes, list[Frame]] = defaultdict(list)
    for path, members in of_file.items():
        pixels, _ = stored_pixels(path, members[0].shape)
        for frame in members:
            content = repr((frame.slope, frame.intercept)).encode() + pixels[frame.index].tobytes()
            group = alike[hashlib.sha256(content).digest()]
            if not group or nearest_mm([frame], group).min() > SAME_MM:
                group.append(frame)
    kept = {id(frame) for group in alike.values() for frame in group}
    return [frame for frame in frames if id(frame) in kept]


def nearest_mm(frames: Sequence[Frame], others: Sequence[Frame]) -> Float[np.ndarray, " frames"]:
    """Distance from each frame's position to the nearest of the others'."""
    here, there = (np.stack([frame.position_mm for frame in group]) for group in (frames, others))
    return np.linalg.norm(here[:, None] - there, axis=2).min(axis=1)


def _apart_mm(one: Frame, other: Frame) -> float:
    return float(np.linalg.norm(one.position_mm - other.position_mm))


def _plane(frame: Frame) -> str:
    return PLANES[int(np.argmax(abs(frame.normal)))]


def step_mm(frames: Sequence[Frame]) -> float:
    """Distance between neighbouring slices, or what the header says of the only one."""
    places = np.unique(np.round([float(frame.position_mm @ frames[0].normal) for frame in frames], 2))
    return float(np.median(np.diff(places))) if len(places) > 1 else frames[0].thickness_mm
