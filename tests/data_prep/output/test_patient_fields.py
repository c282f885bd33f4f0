"""Fields of patients as archives have them: legal ones keep their value, others are corrected or emptied and named."""

import io
import re
import struct

import pydicom
import pytest
from pydicom import Dataset
from pydicom.datadict import tag_for_keyword
from pydicom.dataelem import DataElement

from data_prep.output.patient_fields import legalise

YAMADA = b"Yamada^Tarou=\x1b$B;3ED\x1b(B^\x1b$BB@O:\x1b(B=\x1b$B$d$^$@\x1b(B^\x1b$B$?$m$&\x1b(B"  # PS3.5, H.3.1
MORI = b"Mori^Ogai=\x1b$B?9\x1b(B^\x1b$(Dl?\x1b$B30\x1b(B=\x1b$B$b$j\x1b(B^\x1b$B$*$&$,$$\x1b(B"
HONG = b"Hong^Gildong=\x1b$)C\xfb\xf3^\x1b$)C\xd1\xce\xd4\xd7=\x1b$)C\xc8\xab^\x1b$)C\xb1\xe6\xb5\xbf"  # PS3.5, I.2

pytestmark = [  # pydicom's, which `read_source` ignores
    pytest.mark.filterwarnings(f"ignore:{begin}")
    for begin in ("Unknown encoding", "Incorrect value for Specific", "Value '.*' for Specific", "Failed to decode")
]


def as_read(character_set=None, **values):
    """An image with these values, each as text or as a file's own bytes, as pydicom reads it."""
    values = {tag_for_keyword(keyword): value for keyword, value in values.items()}
    values |= {} if character_set is None else {0x00080005: character_set}
    content = b""
    for tag, value in sorted(values.items()):
        value = value if isinstance(value, bytes) else value.encode()
        content += struct.pack("<HHI", tag >> 16, tag & 0xFFFF, len(value)) + value
    return pydicom.dcmread(io.BytesIO(content), force=True)


def legal(character_set=None, **values):
    image = as_read(character_set, **values)
    notes = legalise(image)
    assert image.SpecificCharacterSet == "ISO_IR 192"
    file = io.BytesIO()
    pydicom.dcmwrite(file, image, implicit_vr=True, little_endian=True)
    return pydicom.dcmread(io.BytesIO(file.getvalue()), force=True), notes


@pytest.mark.parametrize(
    ("character_set", "name", "expected"),
    [
        (b"ISO_IR 100", "Müller^José".encode("latin-1"), "Müller^José"),
        (b"ISO_IR 192", "Müller^José".encode(), "Müller^José"),
        (b"iso-ir 100", "Müller^José".encode("latin-1"), "Müller^José"),
        (b"\\ISO 2022 IR 87", YAMADA, "Yamada^Tarou=山田^太郎=やまだ^たろう"),
        (b"ISO 2022 IR 6\\ISO 2022 IR 149", HONG, "Hong^Gildong=洪^吉洞=홍^길동"),
        (b"GB18030", "Wang^Xiao=王^小俓".encode("gb18030"), "Wang^Xiao=王^小俓"),  # 俓 ends in the byte of a backslash
        # Reported: pydicom 279 and 917, fo-dicom 1805, pynetdicom 201, dcmtk 64 (a term that Orthanc wrote).
        (b"ISO 2022 IR 6\\ISO 2022 IR 87", b"HITACHI^PATIENT", "HITACHI^PATIENT"),
        (b"ISO 2022 IR 6\\ISO 2022 IR 87\\ISO 2022 IR 159", MORI, "Mori^Ogai=森^鷗外=もり^おうがい"),
        (b"\\ISO 2022 IR 58", b"Zhang^XiaoDong=\x1b$)A\xd5\xc5^\x1b$)A\xd0\xa1\xb6\xab= ", "Zhang^XiaoDong=张^小东"),
        (b"GB18030\\ISO IR 192", "Wang^Xiao=王^小俓".encode("gb18030"), "Wang^Xiao=王^小俓"),
        (b"ISO_IR 149", HONG.replace(b"\x1b$)C", b""), "Hong^Gildong=洪^吉洞=홍^길동"),
        (b"ISO_IR 149", HONG, "Hong^Gildong=洪^吉洞=홍^길동"),
        (b"ISO_IR 144", "Люкceмбypг".encode("iso8859_5"), "Люкceмбypг"),
        (b"ISO_IR 13", "ﾔﾏﾀﾞ^ﾀﾛｳ".encode("shift_jis"), "ﾔﾏﾀﾞ^ﾀﾛｳ"),
        (None, b"Doe^John ", "Doe^John"),
        (b"NO SUCH SET", b"Doe^John", "Doe^John"),
    ],
)
def test_a_legal_name_stays_what_it_is(character_set, name, expected):
    image, notes = legal(character_set, PatientName=name)
    assert (str(image.PatientName), notes) == (expected, [])


@pytest.mark.parametrize(
    ("character_set", "name", "expected", "how"),
    [
        (None, "Müller^José".encode("latin-1"), "Müller^José", "missing or ASCII.*Latin-1"),
        (None, "Müller^José".encode(), "Müller^José", "missing or ASCII.*UTF-8"),
        (b"ISO_IR 6", "Müller^José".encode(), "Müller^José", "UTF-8"),
        (b"NO SUCH SET", "Müller^José".encode("latin-1"), "Müller^José", "NO SUCH SET.*Latin-1"),
        (b"ISO_IR 192", "Müller^José".encode("latin-1"), "Müller^José", "ISO_IR 192.*Latin-1"),
        (None, YAMADA, "Yamada^Tarou=山田^太郎=やまだ^たろう", "missing.*escape sequences"),
        (
            b"\\ISO 2022 IR 149",
            HONG.replace(b"\x1b$)C", b""),
            "Hong^Gildong=洪^吉洞=홍^길동",
            "read as ISO 2022 IR 149",
        ),
        (None, b"Doe^Jo\x07hn\x00", "Doe^John", "corrected"),
        (None, b"Doe^John\\Doe^J.", "Doe^John", "corrected"),
        (None, b"A^B^C^D^E^F", "A^B^C^D^E F", "corrected"),
        (None, b"X" * 70 + b"^Y", "X" * 64, "corrected"),
        (None, b"A=B=C=D", "A=B=C", "corrected"),
    ],
)
def test_any_other_name_is_read_or_corrected_and_the_note_names_the_field_alone(character_set, name, expected, how):
    image, notes = legal(character_set, PatientName=name)
    assert str(image.PatientName) == expected
    [note] = notes
    assert re.match(f"Patient's Name .*{how}", note)
    assert "Doe" not in note
    assert "ller" not in note


@pytest.mark.parametrize(
    ("keyword", "value", "expected"),
    [
        ("PatientSex", "U", ""),
        ("PatientSex", "W", ""),
        ("PatientSex", "f", "F"),
        ("PatientSex", "FEMALE", "F"),
        ("PatientBirthDate", "1950", ""),
        ("PatientBirthDate", "1950.01.01", "19500101"),
        ("PatientBirthDate", "1950-01-01", "19500101"),
        ("PatientBirthDate", "19500000", ""),
        ("PatientBirthDate", "00/00/0000", ""),
        ("PatientBirthDate", "20230230", ""),
        ("PatientBirthDate", "19500101-19501231", ""),
        ("StudyDate", "??", ""),
        ("StudyTime", "12:30:05", "123005"),
        ("StudyTime", "9999", ""),
        ("PatientID", "A" * 65, ""),  # shortened, it could be another's
        ("PatientID", "7\\8", ""),
        ("AccessionNumber", "12345678901234567", ""),
        ("StudyDescription", "L" * 70, "L" * 64),
        ("StudyDescription", "spine\\lumbar", "spine/lumbar"),
        ("StudyDescription", "spi\x1fne", "spine"),
        ("PatientAge", "45y", "045Y"),
        ("PatientAge", "23Y", "023Y"),  # reported: dcmqi 250, where no segmentation was written
        ("PatientAge", "45", None),
        ("PatientWeight", "70.12500000000000000", "70.125"),
        ("PatientWeight", "heavy", None),
        ("PatientComments", "one\r\ntwo\x07", "one\r\ntwo"),
        ("ReferringPhysicianName", "Dr\x00^Who\\Dr^No", "Dr^Who"),
    ],
)
def test_what_is_not_legal_is_corrected_or_emptied_and_named(keyword, value, expected):
    image, notes = legal(**{keyword: value})
    assert [note.partition(" is not legal")[0] for note in notes] == [pydicom.datadict.dictionary_description(keyword)]
    found = image.get(keyword)
    assert (found if found is None else str(found)) == expected


@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("PatientSex", "O"),
        ("PatientBirthDate", "19500101"),
        ("StudyTime", "123005.250000"),
        ("StudyTime", "12"),
        ("PatientAge", "045Y"),
        ("PatientID", "0007-ü"),
        ("OtherPatientNames", "Doe^J\\Doe^John"),
        ("PatientWeight", "70.5"),
        ("PatientBirthDate", ""),
    ],
)
def test_what_is_legal_stays(keyword, value):
    image, notes = legal(b"ISO_IR 192", **{keyword: value})
    assert notes == []
    found = image[keyword].value
    assert "\\".join(map(str, found)) == value if keyword == "OtherPatientNames" else str(found or "") == value


def test_items_of_sequences_are_looked_at_too_and_missing_fields_are_there_and_empty():
    image, item = Dataset(), Dataset()
    item.add(DataElement("PatientID", "OB", b"7\\8 "))
    item.add(DataElement("TypeOfPatientID", "OB", b"text"))
    image.OtherPatientIDsSequence = [item]
    file = io.BytesIO()
    pydicom.dcmwrite(file, image, implicit_vr=True, little_endian=True)
    image = pydicom.dcmread(io.BytesIO(file.getvalue()), force=True)
    notes = legalise(image)
    assert [note.split(" is ")[0] for note in notes] == ["Patient ID", "Type of Patient ID"]
    assert image.OtherPatientIDsSequence[0].TypeOfPatientID == "TEXT"
    assert image.OtherPatientIDsSequence[0].PatientID == ""
    assert (image.PatientName, image.StudyID, image.PatientSex) == ("", "", "")
