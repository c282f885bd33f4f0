"""The contrast of a series, T1, T2 and others: from its header, its description or its name."""

import re


def weighting_of(dataset) -> str | None:
    """The contrast of a DICOM image, from echo and repetition time, or else from the description; None if unknown.

    `dataset` is its header.
    """
    sequences = ("MRTimingAndRelatedParametersSequence", "MREchoSequence", "MRModifierSequence")
    timing = [dataset, *functional_groups(dataset, 0, *sequences)]

    def milliseconds(*names):
        values = [item.get(name) for item in timing for name in names]
        return next((float(value) for value in values if isinstance(value, int | float) and value > 0), None)

    echo, repetition = milliseconds("EchoTime", "EffectiveEchoTime"), milliseconds("RepetitionTime")
    inversion = milliseconds("InversionTime", "InversionTimes")
    if inversion and 80 <= inversion <= 300:
        return "stir"
    if echo and echo >= 60:
        return "t2"
    if echo and repetition and echo <= 35:
        return "t1" if repetition <= 1200 or (inversion and inversion > 300) else "pd"
    return weighting_in_text(f"{dataset.get('SeriesDescription') or ''} {dataset.get('ProtocolName') or ''}")


def weighting_in_text(words: str) -> str | None:
    """The contrast named in a description or file name: STIR if it is there, else the only one; None if unclear."""
    found = {match.lower() for match in re.findall(r"(?<![a-z0-9])(t1|t2|stir|pd)(?![0-9])", words, re.IGNORECASE)}
    return found.pop() if len(found) == 1 else "stir" if "stir" in found else None


def functional_groups(dataset, index: int, *names: str) -> list:
    """The functional groups of one frame of an enhanced file: the shared ones and its own."""
    groups = [*(dataset.get("SharedFunctionalGroupsSequence") or ())]
    groups += [*(dataset.get("PerFrameFunctionalGroupsSequence") or ())][index : index + 1]
    return [item for group in groups for name in names for item in (group.get(name) or ())]
