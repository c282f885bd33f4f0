import pytest

from benchmarks.fuzz_readers import FORMATS, run_case, seeds


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return seeds(tmp_path_factory.mktemp("seeds"))


@pytest.mark.parametrize("start", range(len(FORMATS)), ids=FORMATS)
def test_mutated_files_give_a_scan_or_our_own_error(found, tmp_path, start):
    """A few of the cases that `benchmarks/fuzz_readers.py` runs by the thousand, in processes that may die."""
    endings = {run_case(start + len(FORMATS) * case, 7, found, tmp_path) for case in range(25)}
    assert endings <= {"scan", "told"}
    assert "told" in endings
