"""Patient and study fields of a source image, made legal DICOM before results carry them on.

Archives hold names in any character set, dates of other systems and free text in coded fields. A field that is legal
keeps its value, in UTF-8. Any other is corrected where its meaning is plain, else emptied, and a note names it, without
its value, because notes enter logs.
"""

import datetime
import re
from collections.abc import MutableSequence

from pydicom import Dataset
from pydicom.charset import convert_encodings, decode_bytes
from pydicom.config import strict_reading
from pydicom.datadict import dictionary_description, dictionary_has_tag, dictionary_VM, dictionary_VR, keyword_for_tag
from pydicom.dataelem import RawDataElement
from pydicom.sequence import Sequence
from pydicom.valuerep import format_number_as_ds

UTF_8 = "ISO_IR 192"

_REQUIRED = (
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID",
    "AccessionNumber", "ReferringPhysicianName",
)  # fmt: skip
"""DICOM requires these attributes, but they may be empty. Some exports omit them."""

_ALSO = (0x00200010, 0x00201040)  # StudyID, PositionReferenceIndicator
_GROUPS = (0x0008, 0x0010, 0x0012, 0x0032, 0x0038)  # of patient, study, trial and visit
_CHARACTER_SET = 0x00080005
_NAMES = ("PatientID", "IssuerOfPatientID", "AccessionNumber", "StudyID")  # a shortened one could be another's
_LENGTHS = {"LO": 64, "SH": 16, "ST": 1024, "LT": 10240, "UC": 1 << 20, "UT": 1 << 20}  # PS3.5, 6.2
_SEXES = {"male": "M", "female": "F", "other": "O"}
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ufeff]")
_CONTROLS_BUT_LINES = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f]")
_DELIMITERS = {ord(character) for character in "\\^=\r\n\t\f"}
_SELF_IDENTIFYING = [f"ISO 2022 IR {number}" for number in (6, 100, 101, 109, 110, 144, 127, 126, 138, 148, 13, 166)]
_SELF_IDENTIFYING += [f"ISO 2022 IR {number}" for number in (87, 159, 149, 58)]


def legalise(image: Dataset) -> list[str]:
    """Make the patient's and the study's fields of an image legal, in place, and its character set UTF-8.

    Returns:
        A note on each field that was corrected or emptied.
    """
    terms = _character_set(image)
    notes: dict[str, str] = {}
    tags = list(image.keys())  # iterating over the image would read the values
    for tag in tags:
        if tag.group in _GROUPS or tag in _ALSO:
            _legalise(image, tag, terms, notes)
    image.SpecificCharacterSet = UTF_8
    for keyword in _REQUIRED:
        if keyword not in image:
            setattr(image, keyword, "")
    return [f"{field} {what}." for field, what in notes.items()]


def _legalise(data: Dataset, tag, terms: list[str], notes: dict[str, str]) -> None:
    if tag.is_private or tag == _CHARACTER_SET or not dictionary_has_tag(tag):
        return
    vr, keyword, field = dictionary_VR(tag), keyword_for_tag(tag), dictionary_description(tag)
    if vr == "SQ":
        try:
            items = data[tag].value
        except Exception:  # pydicom may raise any
            items = None
        if not isinstance(items, Sequence):
            del data[tag]
            notes[field] = "is no sequence: left out"
            return
        for item in items:
            own = _character_set(item) if _CHARACTER_SET in item else terms
            for inner in list(item.keys()):
                _legalise(item, inner, own, notes)
            item.pop(_CHARACTER_SET, None)
        return
    if vr not in (*_LENGTHS, *_RULES):
        return
    found = data.get_item(tag)
    if isinstance(found, RawDataElement) and found.value is not None:
        text, doubt = _decoded(found.value, terms)
    else:
        text, doubt = _as_text(found.value), ""
    text = "\\".join(value.strip("\x00 ") for value in text.split("\\"))
    legal = _legal(vr, keyword, dictionary_VM(tag), text)
    if legal is None:
        notes[field] = "is not legal DICOM: left empty"
    elif legal != text:
        notes[field] = "is not legal DICOM: corrected"
    elif doubt:
        notes[field] = doubt
    if legal is None and keyword not in _REQUIRED:
        del data[tag]
    else:
        data.add_new(tag, vr, legal or "")


def _as_text(value) -> str:
    return "\\".join(map(str, value)) if isinstance(value, MutableSequence) else str(value or "")


# Character sets ------------------------------------------------------------------------------------------------------


def _character_set(data: Dataset) -> list[str]:
    """The terms of SpecificCharacterSet (PS3.3, C.12.1.1.2), with usual misspellings put right; "" is ASCII."""
    found = data.get_item(_CHARACTER_SET) if _CHARACTER_SET in data else None
    value = found.value if found is not None else ""
    text = value.decode("latin-1") if isinstance(value, bytes) else _as_text(value)
    terms = [term.strip("\x00 ") for term in text.split("\\")]
    terms = ["" if re.fullmatch(r"(?i)iso[ _-]*ir[ _-]*6", term) else term for term in terms]
    terms = [re.sub(r"(?i)^iso[ _-]*2022[ _-]*ir[ _-]*(\d+)$", r"ISO 2022 IR \1", term) for term in terms]
    terms = [re.sub(r"(?i)^iso[ _-]*ir[ _-]*(\d+)$", r"ISO_IR \1", term) for term in terms]
    return [
        re.sub(r"^ISO_IR (58|87|149|159)$", r"ISO 2022 IR \1", term) for term in terms
    ]  # exist with extensions only


def _decoded(raw: bytes, terms: list[str]) -> tuple[str, str]:
    """The text of an element, and how it was read if its data set does not say, or says what cannot be."""
    escaped = b"\x1b" in raw
    if raw.isascii() and not escaped:
        return raw.decode("ascii"), ""
    for guess in [terms, _SELF_IDENTIFYING] if escaped else [terms]:
        if guess[0] not in ("", "ISO 2022 IR 6") or escaped:  # else pydicom reads Latin-1
            try:
                with strict_reading():
                    text = decode_bytes(raw, convert_encodings(list(guess)), _DELIMITERS)
            except (LookupError, ValueError):
                continue
            text = text.replace("\x1b$)A", "")  # pydicom leaves that of ISO 2022 IR 58 in
            return text, "" if guess is terms else f"does not fit {_named(terms)}: its escape sequences were followed"
    for term in ("UTF-8", *terms[1:], "Latin-1"):
        try:
            text = raw.decode(convert_encodings([term])[0])
        except (LookupError, ValueError):
            continue
        return text, f"does not fit {_named(terms)}: read as {term}"
    raise AssertionError("Latin-1 has a character for every byte")


def _named(terms: list[str]) -> str:
    return f"Specific Character Set ({' '.join(terms).strip() or 'missing or ASCII'})"


# Values --------------------------------------------------------------------------------------------------------------


def _legal(vr: str, keyword: str, multiplicity: str, text: str) -> str | None:
    """The value that DICOM allows; None if there is none."""
    if keyword in _NAMES:
        illegal = _CONTROLS.search(text) or "\\" in text or len(text) > _LENGTHS[dictionary_VR(keyword)]
        return None if illegal else text
    if keyword == "PatientSex":
        sex = _SEXES.get(text.lower(), text.upper())
        return sex if sex in ("", *_SEXES.values()) else None
    if vr in ("ST", "LT", "UT"):
        return _CONTROLS_BUT_LINES.sub("", text)[: _LENGTHS[vr]]
    values = text.split("\\")
    if multiplicity == "1" and vr in ("LO", "SH", "UC"):
        values = [text.replace("\\", "/")]
    elif multiplicity == "1":
        values = values[:1]
    rule = _RULES.get(vr) or (lambda value: _CONTROLS.sub("", value).strip()[: _LENGTHS[vr]])
    legal = [rule(value) if value else "" for value in values]
    return None if None in legal else "\\".join(map(str, legal))


def _name(text: str) -> str:
    """Up to three groups (PS3.5, 6.2.1) of up to five components and 64 characters."""
    groups = []
    for group in _CONTROLS.sub("", text).split("=")[:3]:
        *components, rest = group.split("^", 4)
        groups.append("^".join([*components, rest.replace("^", " ")])[:64])
    return "=".join(groups)


def _date(text: str) -> str | None:
    parts = re.fullmatch(r"(\d{4})([-./]?)(\d\d)\2(\d\d)", text)
    try:
        return parts and datetime.date(int(parts[1]), int(parts[3]), int(parts[4])).strftime("%Y%m%d").rjust(8, "0")
    except ValueError:
        return None


def _time(text: str) -> str | None:
    compact = re.sub(r"^(\d\d):(\d\d)(?::(\d\d))?", lambda found: "".join(filter(None, found.groups())), text)
    legal = re.fullmatch(r"([01]\d|2[0-3])([0-5]\d([0-5]\d(\.\d{1,6})?)?)?", compact)
    return compact if legal else None


def _age(text: str) -> str | None:
    parts = re.fullmatch(r"(\d{1,3})([DWMY])", text.upper())
    return parts and f"{int(parts[1]):03d}{parts[2]}"


def _code(text: str) -> str | None:
    return text.upper() if re.fullmatch(r"[A-Z0-9 _]{0,16}", text.upper()) else None


def _decimal(text: str) -> str | None:
    if not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", text):
        return None
    return text if len(text) <= 16 else format_number_as_ds(float(text))


def _integer(text: str) -> str | None:
    return text if re.fullmatch(r"[+-]?\d{1,11}", text) else None


_RULES = {"PN": _name, "DA": _date, "TM": _time, "AS": _age, "CS": _code, "DS": _decimal, "IS": _integer}
