"""The page of an inventory: everything in it, nothing from elsewhere, and no name that acts."""

import base64
import io
import re

import numpy as np
from PIL import Image

from data_prep.__main__ import main
from data_prep.read.metaimage import write_mha
from data_prep.read.scan import Scan
from tests.block_spine import block_spine
from tests.dicom_files import save, series

SPINE = block_spine(spacing_mm=(1.5, 1.5, 6.0), num_slices=5)
HOSTILE = "</td><script>alert(1)</script><img src=x onerror=alert(1)>"


def test_the_page_shows_every_series_and_escapes_names(tmp_path):
    root = tmp_path / "export"
    turned = Scan(SPINE.scan.voxels, SPINE.scan.affine[[1, 0, 2, 3]] * np.array([[-1], [1], [1], [1]]), "")
    for name, scan in (("t2", SPINE.scan), ("cor", turned)):
        for one in series(root / name, scan, name=name):
            one.SeriesDescription = HOSTILE
            save(one)
    resampled = SPINE.scan.voxels.copy()
    resampled[:10] = np.nan  # where nothing is known
    write_mha(root / "b_t2.mha", Scan(resampled, SPINE.scan.affine, ""))
    (root / "c_t2.mha").write_bytes(b"no scan")
    page = tmp_path / "page" / "inventory.html"
    assert main(["inventory", str(root), "--out", str(tmp_path / "i.csv"), "--html", str(page)]) == 0
    text = page.read_text()
    assert page.stat().st_mode & 0o777 == 0o600
    assert text.count("<tr") == 5
    assert HOSTILE not in text
    assert text.count("&lt;script&gt;alert(1)") == 2
    assert "default-src 'none'" in text
    assert not re.search(r'(src|href)="(?!data:)', text)
    pictures = re.findall(r"data:image/webp;base64,([^\"]+)", text)
    assert len(pictures) == 3  # the fourth cannot be read
    for picture in pictures:
        image = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture))))
        assert max(image.shape) <= 128
        assert image.std() > 10
