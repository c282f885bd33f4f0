"""Images that are no scans: localisers, maps, reformats, screen saves and other derived images, by their headers."""

import re
from collections.abc import Callable, Sequence
from typing import Any

NO_PLACE = "no position in the patient"

# Classic, enhanced, and enhanced converted from classic; "" is not given.
_MR_IMAGES = ("", *(f"1.2.840.10008.5.1.4.1.1.4{end}" for end in ("", ".1", ".4")))

_DERIVED = (  # what it is; a word of ImageType; words of the description that are clear without ImageType
    ("a localiser", "locali[sz]er|scout|survey", r"locali[sz]\w*|loc|topogram|scout|survey|(3|three|tri)[ _-]?plane?"),
    ("an ADC map", "adc|apparent.*|adc_map", r"adc|dadc|apparent diffusion.*"),
    ("a diffusion image", "diffusion|dwi|tracew?|fa|tensor.*|calc_bvalue", r"dwi|dti|tracew?|ep2d_diff\w*|diffusion"),
    ("a subtraction", "sub|subtract(ion|ed)?", r"subtract(ion|ed)?"),
    ("a screen save", "screen_save|screenshot|posdisp", r"screen[ _]?(save|shot)s?"),
    ("a projection", "m(in)?ip|max_?ip|projection_image|maximum|minimum", r"mip|projection"),
    ("a reformat", "mpr|mprs?_.*|reformatted|reformat|cpr|resampled", r"mpr|reformat(ted)?"),
    ("a mosaic", "mosaic", r"mosaic"),
    ("a parameter map", r"(t1|t2|t2_?star|t2\*|r1|r2|r2_?star|r2\*|t1rho|b0|b1)_?map", r"(t1|t2\*?|r2\*?)[ _-]?map\w*"),
    ("a fat fraction map", "(fat|water)_?frac(tion)?|ff|pdff", r"(fat|water)[ _-]?frac\w*|pdff"),
    ("a perfusion map", "perfusion|cbf|cbv|mtt|ttp", r"perfusion|cbf|cbv"),
    ("a phase image", "p|p_\\w+|phase|phase_map", r"phase[ _]?map"),
    ("an imaginary part", "i|imaginary", r"imaginary"),
)


def why_no_scan(dataset: Any) -> str:
    """Why a DICOM file cannot be part of a scan, or "". `dataset` is its header."""
    if "Rows" not in dataset:
        return "no image"
    if (dataset.get("Modality") or "MR") != "MR":
        return f"modality {dataset.Modality}"
    photometric = dataset.get("PhotometricInterpretation")
    if dataset.get("SamplesPerPixel", 1) != 1 or photometric not in ("MONOCHROME1", "MONOCHROME2"):
        return f"a picture ({photometric}), not a scan"
    if (dataset.get("SOPClassUID") or "") not in _MR_IMAGES:
        return f"{dataset.SOPClassUID.name}, not an MR scan"
    return ""


def why_derived(image_type: Sequence[str], description: str, values: Callable[..., Any]) -> str:
    """What an image is instead of one that was acquired, or "".

    Args:
        image_type: its ImageType, in lower case, with _ for spaces.
        description: of its series.
        values: gives the first value that its header has among some attributes, or None.
    """
    for kind, types, words in _DERIVED:
        if any(re.fullmatch(types, word) for word in image_type):
            return f"{kind} by its ImageType"
        if re.search(rf"(?<![a-z0-9])({words})(?![a-z0-9])", description, re.IGNORECASE):
            return f"{kind} by its description"
    sequence = values("ScanningSequence") or ()
    if (values("DiffusionBValue") or 0) > 0 or "EP" in ([sequence] if isinstance(sequence, str) else sequence):
        return "an echo-planar or diffusion image by its header"
    return ""
