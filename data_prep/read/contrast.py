"""The contrast of a series, T1, T2 and others: from its header, its description or its name.

Header and words are judged apart. Where one is more special than the other (a STIR that is described as T2), the more
special one holds. Where they contradict each other, nobody can tell which is right, and both are kept.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# More special than T2: a series described as "t2" may be one of these, but these are not read as T2.
_KINDS_OF_T2 = frozenset({"stir", "t2-flair", "t2*", "myelogram", "steady-state"})

# Variable flip angles make the nominal echo times of 3-D sequences longer.
_MYELOGRAM_MS, _MYELOGRAM_3D_MS = 300, 500

_PLAIN = r"(?<![a-z0-9])(t1|t2|pd(?=(?:w|fs|tse|sag|ax|cor)?(?![a-z])))(?![0-9])"  # no Pdiaz, but PDw and PDfs
_IN_NAMES = {  # in descriptions and file names
    "stir": r"(?<![a-z])(stir|tirm)(?![a-z])",
    "t2-flair": r"(?<![a-z])(flair|dark[ _-]?fluid)",
    "t2*": r"(?<![a-z0-9])t2[ _-]?(\*|star)",
    "myelogram": r"(?<![a-z])(myelo|myur)",
}
_SEQUENCES = {  # names of sequences, in descriptions only: in a file's name they may be plain words
    "t2*": r"(?<![a-z])(medic|merge|me2d|swi)(?![a-z])",
    "steady-state": r"(?<![a-z])(ciss|fiesta|trufi|true[ _-]?fisp|b[ _-]?ffe)",
}
_DIXON = {  # ImageType of what a Dixon sequence computes; and its description
    "fat": ("f|fat", r"^fat:|(dixon|dxn|ideal|flex).*[\W_](f|fat)\W*$"),
    "water": ("w|water", r"^water:|(dixon|dxn|ideal|flex).*[\W_](w|water)\W*$"),
    "opposed-phase": (
        "op|opp|(out|opp|opposed|out_of)_phase",
        r"^outphase:|out[ _-]?of[ _-]?phase|opposed|(dixon|dxn).*[_ ]opp$",
    ),
    "in-phase": ("ip|in|in_phase", r"^inphase:|in[ _-]?phase|(dixon|dxn).*[_ ]in$"),
}
_FAT_SATURATED = r"(?<![a-z])(t?fs|fat[ _-]?(sat|supp?)\w*|spair|spir)(?![a-z])"


@dataclass(frozen=True)
class Contrast:
    """The contrast of an image, by its header and by the words of its description.

    Names are "t1", "t2", "pd", "stir", "t2-flair", "t2*", "myelogram", "steady-state", and, of a Dixon sequence, "fat",
    "water" and "opposed-phase".
    """

    by_header: tuple[str, ...] = ()  # what it may be; empty if the header does not say
    by_words: str = ""
    header: str = ""  # the header's times, for messages
    remarks: tuple[str, ...] = ()  # "fat-saturated" and the like

    @property
    def names(self) -> tuple[str, ...]:
        """What it is; several names if that is not clear; none if nothing is known."""
        header, words = self.by_header, self.by_words
        if not header or not words or words in header:
            return (words,) if words else header
        special = tuple(name for name in header if name in _KINDS_OF_T2) if words == "t2" else ()
        if special or set(header) & set(_DIXON):
            return special or header
        if (words in _KINDS_OF_T2 and "t2" in header) or (words == "stir" and "pd" in header):
            return (words,)
        return (*header, words)

    @property
    def dixon(self) -> str:
        """Which image of a Dixon sequence it is; "" if of another sequence."""
        return next((name for name in self.by_header if name in _DIXON), "in-phase" * ("in phase" in self.remarks))

    @property
    def contradictory(self) -> bool:
        """Whether header and words exclude each other."""
        return bool(set(self.by_header) & set(self.names)) and self.by_words in set(self.names) - set(self.by_header)

    def __str__(self) -> str:
        return " ".join((" or ".join(self.names), *self.remarks)).strip()

    def source(self) -> str:
        """Its name, and what says so."""
        if self.contradictory:
            times = f" ({self.header})" if self.header else ""
            return f"{' or '.join(self.by_header)} by its header{times}, but {self.by_words} by its description"
        return f"{self} by its {'header' if self.names[0] in self.by_header else 'description'}"


def contrast_of(values: Callable[..., Any], image_type: tuple[str, ...], description: str) -> Contrast:
    """The contrast of a DICOM image.

    Args:
        values: gives the first value that its header has among some attributes, or None.
        image_type: its ImageType, in lower case.
        description: of its series.
    """
    echo, repetition, inversion = (
        _number(values(*names))
        for names in (
            ("EchoTime", "EffectiveEchoTime"),
            ("RepetitionTime",),
            ("InversionTime", "InversionTimes"),
        )
    )
    times = (("TE", echo), ("TR", repetition), ("TI", inversion))
    header = ", ".join(f"{name} {value:g} ms" for name, value in times if value)
    dixon = {
        name
        for name, (types, words) in _DIXON.items()
        if any(re.fullmatch(types, word) for word in image_type) or re.search(words, description, re.IGNORECASE)
    }
    by_header = tuple(sorted(dixon - {"in-phase"})) or _by_times(values, echo, repetition, inversion)
    options = " ".join([*_words(values("ScanOptions")), *_words(values("SpectrallySelectedSuppression"))])
    saturated = re.search(_FAT_SATURATED, f"{options} {description}".replace("_GEMS", ""), re.IGNORECASE)
    remarks = ("in phase",) * ("in-phase" in dixon)
    remarks += ("fat-saturated",) * bool(saturated or "FAT" in options.split())
    remarks += ("with contrast agent",) * bool(values("ContrastBolusAgent", "ContrastBolusAgentSequence"))
    by_words = weighting_in_text(description, _SEQUENCES) or weighting_in_text(str(values("ProtocolName") or ""))
    return Contrast(by_header, by_words or "", header, remarks)


def _by_times(values: Callable[..., Any], echo: float, repetition: float, inversion: float) -> tuple[str, ...]:
    """What the times (ms, 0 if unknown) and the kind of sequence leave possible."""
    kinds = _words(values("ScanningSequence"))
    sequence = str(values("SequenceName", "PulseSequenceName") or "")
    inverts = inversion or "IR" in kinds or values("InversionRecovery") == "YES" or re.match(r"\*?tir", sequence)
    if 80 <= inversion <= 300:
        return ("stir",)
    if not echo:
        return ()
    if values("EchoPulseSequence") == "GRADIENT" or ("GR" in kinds and "SE" not in kinds):
        if "SS" in _words(values("SequenceVariant")) and "SP" not in _words(values("SequenceVariant")):
            return ("steady-state",)
        return ("t2*",) if echo >= 8 and not inverts else ("t1",)
    if inversion > 1500 and echo >= 60:
        return ("t2-flair",)
    if inverts and not inversion:  # the time that would say which is missing
        return ("stir", "t2-flair") if echo > 35 else ("stir", "t1")
    volume = values("MRAcquisitionType") == "3D"
    if echo >= (_MYELOGRAM_3D_MS if volume else _MYELOGRAM_MS):
        return ("myelogram",)
    if echo >= 60:
        return ("t2",)
    if not repetition:
        return ()
    if echo <= 35:
        short = repetition <= 1200 or inversion > 300
        return ("t1",) if short else ("pd", "t1") if repetition < 2500 else ("pd",)
    return ("pd", "t2") if repetition > 1200 else ()


def weighting_in_text(words: str, more: dict[str, str] | None = None) -> str | None:
    """The contrast named in a description or file name; None if there is none, or T1 beside T2.

    `more` are further patterns, by the contrast that they mean.
    """
    plain = {match.lower() for match in re.findall(_PLAIN, words, re.IGNORECASE)}
    patterns = [*_IN_NAMES.items(), *(more or {}).items()]
    special = next((name for name, pattern in patterns if re.search(pattern, words, re.IGNORECASE)), None)
    if special and not (special == "t2-flair" and "t1" in plain):  # T1 FLAIR is a T1
        return special
    return plain.pop() if len(plain) == 1 else None


def _number(value: Any) -> float:
    value = value[0] if isinstance(value, list | tuple) and value else value
    return float(value) if isinstance(value, int | float) and value > 0 else 0.0


def _words(value: Any) -> list[str]:
    return [str(word).upper() for word in ([value] if isinstance(value, str) else value or ())]
