import os

import pytest

from data_prep.dataset.pseudonyms import Pseudonyms, load_or_make_key
from spinejax.errors import SpinejaxError


def test_pseudonyms_are_stable_distinct_and_say_nothing():
    pseudonyms = Pseudonyms(bytes(32))
    names = [f"{number}" for number in range(500)]
    patients = [pseudonyms.patient(name) for name in names]
    assert patients == [Pseudonyms(bytes(32)).patient(name) for name in names]
    assert len(set(patients)) == 500
    assert all(len(name) == 16 and int(name, 16) >= 0 for name in patients)


def test_patient_and_scan_of_one_name_differ():
    pseudonyms = Pseudonyms(bytes(32))
    assert pseudonyms.patient("7") != pseudonyms.scan("7")


def test_other_key_other_pseudonym():
    assert Pseudonyms(bytes(32)).patient("7") != Pseudonyms(b"\1" * 32).patient("7")


def test_key_does_not_print():
    assert "secret" not in repr(Pseudonyms(b"secret" * 6))


def test_key_is_made_beside_the_data_set_readable_by_its_owner_only(tmp_path):
    out = tmp_path / "discs"
    first = load_or_make_key(None, out)
    key = tmp_path / "discs.key"
    assert key.stat().st_mode & 0o777 == 0o600
    assert len(key.read_bytes()) == 32
    assert not out.exists()
    assert load_or_make_key(None, out).key == first.key


def test_given_key_is_made_or_read(tmp_path):
    path = tmp_path / "keys" / "mine"
    assert load_or_make_key(path, tmp_path / "out").key == path.read_bytes()


def test_two_data_sets_get_two_keys(tmp_path):
    assert load_or_make_key(None, tmp_path / "a").key != load_or_make_key(None, tmp_path / "b").key


@pytest.mark.parametrize("inside", ["out/key", "out/deeper/key", "other/../out/key"])
def test_key_inside_the_data_set_is_refused(tmp_path, inside):
    with pytest.raises(SpinejaxError, match="lies inside the data set"):
        load_or_make_key(tmp_path / inside, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.name != "posix", reason="file modes")
def test_key_that_others_can_read_is_refused(tmp_path):
    load_or_make_key(tmp_path / "key", tmp_path / "out")
    (tmp_path / "key").chmod(0o644)
    with pytest.raises(SpinejaxError, match="chmod 600"):
        load_or_make_key(tmp_path / "key", tmp_path / "out")


def test_file_that_is_no_key_is_refused(tmp_path):
    path = tmp_path / "key"
    path.write_bytes(b"short")
    path.chmod(0o600)
    with pytest.raises(SpinejaxError, match="5 bytes, a key has 32"):
        load_or_make_key(path, tmp_path / "out")
