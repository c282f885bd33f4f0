"""DICOMweb: a real Orthanc where it is installed, and a server that misbehaves as real ones do."""

import contextlib
import http.server
import json
import os
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pydicom
import pytest

from data_prep.read import dicomweb
from data_prep.read.dicomweb import fetched, store
from data_prep.read.scan import Scan
from data_prep.read.series import find_series
from spinejax.errors import SpinejaxError
from tests.dicom_files import series, small_scan_voxels
from tests.orthanc import PASSWORD, USER, free_port, needs_orthanc, running_orthanc

AFFINE = np.array([[0, 0, 4.0, -10], [0, 0.5, 0, -20], [-0.5, 0, 0, 30], [0, 0, 0, 1]])
STUDY = "1.2.3"


@pytest.fixture
def images(tmp_path):
    """A series' files."""
    series(tmp_path / "images", Scan(small_scan_voxels(), AFFINE, "small"))
    return sorted((tmp_path / "images").iterdir())


@pytest.fixture(autouse=True)
def nobody_known(monkeypatch, tmp_path):
    """No credentials of whoever runs the tests, and a folder of temporary files of its own."""
    for name in ("DICOMWEB_USER", "DICOMWEB_PASSWORD", "DICOMWEB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    return tmp_path


@pytest.fixture(scope="module")
def orthanc(tmp_path_factory):
    with running_orthanc(tmp_path_factory.mktemp("orthanc")) as address:
        yield address


@needs_orthanc
def test_a_study_goes_to_an_orthanc_and_comes_back(orthanc, images, monkeypatch, nobody_known):
    monkeypatch.setenv("DICOMWEB_USER", USER)
    monkeypatch.setenv("DICOMWEB_PASSWORD", PASSWORD)
    assert store(f"http://{orthanc}", images) == (len(images), {})
    first = pydicom.dcmread(images[0])
    [before] = find_series([images[0].parent], weighting="any").series
    for end in ("", f"/series/{first.SeriesInstanceUID}"):
        address = Path(f"dicomweb://{orthanc}/studies/{first.StudyInstanceUID}{end}")
        with fetched([address, images[0].parent]) as (folder, other):
            assert other == images[0].parent
            assert stat.S_IMODE(folder.parent.parent.stat().st_mode) == 0o700
            [after] = find_series([folder], weighting="any").series
            assert after.key == before.key
            np.testing.assert_array_equal(after.read()[0].voxels, before.read()[0].voxels)
        assert not folder.exists()
    assert not list((nobody_known / "temporary").iterdir())


@needs_orthanc
def test_an_orthanc_asks_for_a_password_and_netrc_has_it(orthanc, images, nobody_known):
    with pytest.raises(SpinejaxError, match=rf"http://{orthanc}: access is denied \(401; 0 of 6.*DICOMWEB_USER.*netrc"):
        store(f"http://{orthanc}", images)
    (nobody_known / "netrc").write_text(f'machine 127.0.0.1 login {USER} password "{PASSWORD}"\n')
    assert store(f"http://{orthanc}/studies", images[:1]) == (1, {})
    with (
        pytest.raises(SpinejaxError, match=r"not there \(404; study 1.2.999\)"),
        fetched([Path(f"dicomweb://{orthanc}/studies/1.2.999")]),
    ):
        pass


# A server that misbehaves --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def server(answer):
    """A server whose every answer is `answer(request) -> status, headers, body`; its address, and the requests."""
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            requests.append(self)
            status, headers, body = answer(self)
            self.send_response(status)
            for name, value in {"Content-Length": len(body), **headers}.items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET  # noqa: N815

        def log_message(self, *_):
            pass

    one = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=one.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{one.server_address[1]}/dicom-web", requests
    finally:
        one.shutdown()
        one.server_close()
        thread.join()


def stored(path, *, failed=None):
    """The answer of STOW-RS to one object: stored, or failed for a reason (PS3.18, 10.5.3)."""
    item = {"00081155": {"vr": "UI", "Value": [str(pydicom.dcmread(path).SOPInstanceUID)]}}
    if failed is not None:
        item |= {"00081197": {"vr": "US", "Value": [failed]}}
    return json.dumps({"00081198" if failed is not None else "00081199": {"vr": "SQ", "Value": [item]}}).encode()


JSON = {"Content-Type": "application/dicom+json; charset=utf-8"}


@pytest.mark.parametrize("status", [200, 202, 409])
def test_an_object_that_a_server_does_not_store_is_named_with_the_reason(images, status):
    answers = iter([(200, stored(images[0])), (status, stored(images[1], failed=0x0122)), (200, stored(images[2]))])

    def answer(_):
        code, body = next(answers)
        return code, JSON, body

    with server(answer) as (address, _):
        sent, failures = store(f"http://{address}", images[:3])
    assert sent == 2
    assert failures == {"images/00001": f"http://{address} did not store it: SOP class not supported (0122H)."}


def test_an_answer_that_does_not_name_the_object_is_no_success(images):
    """Reported: dicomweb-client 42. A server answered 200, and what came in chunks was lost."""
    large = pydicom.dcmread(images[0])
    large.add_new(0x00420011, "OB", bytes(3 << 20))
    large.save_as(images[0])
    with server(lambda _: (200, {}, b"")) as (address, requests):
        sent, failures = store(f"http://{address}", images[:1])
    assert (sent, len(failures)) == (0, 1)
    assert [("Transfer-Encoding" in one.headers, int(one.headers["Content-Length"]) > 3 << 20) for one in requests] == [
        (False, True)
    ]
    with server(lambda _: (200, JSON, b"{}")) as (address, _):
        assert store(f"http://{address}", images[:1])[1]["images/00000"].endswith("does not say that it is stored.")
    with server(lambda _: (413, {"Content-Type": "text/html"}, b"<html>")) as (address, _):
        sent, failures = store(f"http://{address}", images[:2])
    assert (sent, len(failures)) == (0, 2)
    assert failures["images/00000"].endswith("did not store it: status 413.")


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        ((403, {}, b""), r"access is denied \(403"),
        ((404, {}, b""), r"not there \(404"),
        ((500, {}, b""), "the server answered 500"),
        ((503, {}, b""), "the server is busy or failing"),
        ((302, {"Location": "http://127.0.0.1:9/"}, b""), "no connection"),
        ((200, {"Content-Type": "text/html"}, b"<html>sign in"), "the answer is not DICOMweb"),
        (
            (
                200,
                {"Content-Type": 'multipart/related; type="application/dicom"; boundary=b'},
                b"--b\r\n\r\nx\r\n--b--",
            ),
            "the answer is not DICOMweb",
        ),
        (
            (200, {"Content-Type": "multipart/related; boundary=b", "Content-Length": 999}, b"--b\r\n"),
            "no connection, or it broke off",
        ),
    ],
)
def test_what_a_server_may_do_is_one_line_and_nothing_stays(answer, fault, monkeypatch, nobody_known):
    monkeypatch.setattr(dicomweb, "_ATTEMPTS", 1)
    with (
        server(lambda _: answer) as (address, _),
        pytest.raises(SpinejaxError, match=rf"dicomweb://{address}: {fault}") as error,
        fetched([Path(f"dicomweb://{address}/studies/{STUDY}")]),
    ):
        pass
    assert "\n" not in str(error.value)
    assert not list((nobody_known / "temporary").iterdir())


def test_a_server_that_is_not_there_or_does_not_answer(images, monkeypatch):
    monkeypatch.setattr(dicomweb, "_ATTEMPTS", 1)
    port = free_port()
    with pytest.raises(SpinejaxError, match=f"http://127.0.0.1:{port}/dicom-web: no connection"):
        store(f"http://127.0.0.1:{port}/dicom-web", images[:1])
    monkeypatch.setattr(dicomweb, "_TIMEOUT_S", (1, 0.2))
    waiting = threading.Event()
    with server(lambda _: (waiting.wait(5), (200, {}, b""))[1]) as (address, _):
        with (
            pytest.raises(SpinejaxError, match="no answer in time"),
            fetched([Path(f"dicomweb://{address}/studies/{STUDY}")]),
        ):
            pass
        waiting.set()


def test_tls_is_spoken_where_it_is_asked_for(images, monkeypatch):
    monkeypatch.setattr(dicomweb, "_ATTEMPTS", 1)
    with server(lambda _: (200, {}, b"")) as (address, _):
        with pytest.raises(SpinejaxError, match=f"https://{address}: (its certificate|no connection)"):
            store(f"https://{address}", images)
        with (
            pytest.raises(SpinejaxError, match=f"dicomwebs://{address}"),
            fetched([Path(f"dicomwebs://{address}/studies/{STUDY}")]),
        ):
            pass


@pytest.mark.parametrize(
    ("settings", "header"),
    [
        ({"DICOMWEB_USER": "me", "DICOMWEB_PASSWORD": "secret"}, "Basic bWU6c2VjcmV0"),
        ({"DICOMWEB_TOKEN": "abc", "DICOMWEB_USER": "me"}, "Bearer abc"),
        ({}, "Basic bmV0OnJj"),
    ],
)
def test_credentials_come_from_the_environment_or_netrc(settings, header, images, monkeypatch, nobody_known, capfd):
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    (nobody_known / "netrc").write_text("machine 127.0.0.1 login net password rc\n")
    with server(lambda _: (401, {}, b"")) as (address, requests), pytest.raises(SpinejaxError, match="401") as error:
        store(f"http://{address}", images)
    assert [request.headers["Authorization"] for request in requests] == [header]
    said = capfd.readouterr()
    for secret in ("secret", "abc", "rc", "Basic", "Bearer"):
        assert secret not in said.out + said.err + str(error.value).replace("netrc", "")


@pytest.mark.parametrize("address", ["http://me:secret@127.0.0.1/dicom-web", "ftp://127.0.0.1", "archive", "http://"])
def test_an_address_with_a_password_or_of_another_kind_is_refused_without_repeating_it(address):
    with pytest.raises(SpinejaxError, match="DICOMWEB_USER") as error:
        dicomweb.check_server(address)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("address", ["dicomweb://h/studies", "dicomweb://h/dicom-web/studies/../etc", "dicomwebs://"])
def test_an_address_of_no_study_is_refused(address):
    with pytest.raises(SpinejaxError, match="expected dicomweb://HOST/PATH/studies/UID"), fetched([Path(address)]):
        pass


def test_what_was_fetched_is_deleted_when_the_process_is_ended(images, nobody_known):
    """By SIGTERM, as of a scheduler."""
    body = b"--b\r\nContent-Type: application/dicom\r\n\r\n" + images[0].read_bytes() + b"\r\n--b--\r\n"
    with server(lambda _: (200, {"Content-Type": "multipart/related; boundary=b"}, body)) as (address, _):
        code = (
            "import time\nfrom pathlib import Path\nfrom data_prep.read.dicomweb import fetched\n"
            f"with fetched([Path('dicomweb://{address}/studies/{STUDY}')]) as [folder]:\n"
            "    print(len(list(folder.iterdir())), flush=True); time.sleep(60)"
        )
        temporary = nobody_known / "temporary"
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, env=os.environ | {"TMPDIR": str(temporary)}
        )
        assert process.stdout.readline() == b"1\n"
        assert list(temporary.iterdir())
        process.terminate()
        assert process.wait(timeout=30) == 143
        process.stdout.close()
    assert not list(temporary.iterdir())
