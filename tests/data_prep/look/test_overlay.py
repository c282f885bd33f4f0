from data_prep.__main__ import main
from tests.data_prep.sources.test_scan_files import write_set


def test_overlay_draws_scans_and_reports_which(tmp_path, capsys):
    root = write_set(tmp_path)
    (root / "masks" / "b_t2.mha").unlink()
    where = ["overlay", str(root / "images"), "--masks", str(root / "masks")]
    assert main([*where, "--out", str(tmp_path / "sheets" / "page.png")]) == 0
    assert (tmp_path / "sheets" / "page.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "1: a_t2.mha"
    assert printed[1].startswith("2: b_t2.mha: no mask")
    assert main([*where, "--out", str(tmp_path / "page.pdf")]) == 2
    assert "a name in .png" in capsys.readouterr().err
