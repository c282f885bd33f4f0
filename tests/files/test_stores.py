"""What a Google bucket answers, told as what it means; the server is this test's own."""

import json
import threading

import fsspec
import pytest
from werkzeug.serving import make_server

from spinejax.files import stores
from spinejax.files.stores import Address, StoreError
from tests.object_store import Quiet


@pytest.fixture
def google(monkeypatch):
    """A server that gives one answer to all requests: its `status`, which a test sets. It counts them."""

    class Server:
        status, requests = 200, 0

        def answer(self, environ, start_response):
            self.requests += 1
            body = json.dumps({"error": {"message": "as the test wants"}}).encode()
            start_response(f"{self.status} Status", [("Content-Type", "application/json")])
            return [body]

    google = Server()
    server = make_server("127.0.0.1", 0, google.answer, threaded=True, request_handler=Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server.port}")
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.setattr(stores, "WAITS_SECONDS", (0, 0))
    fsspec.get_filesystem_class("gs").clear_instance_cache()
    yield google
    server.shutdown()
    server.server_close()
    fsspec.get_filesystem_class("gs").clear_instance_cache()


@pytest.mark.parametrize("status", [403, 401])
def test_a_refusal_is_no_permission_and_is_not_asked_again(google, status, caplog):
    google.status = status
    with pytest.raises(StoreError, match=r"^gs://spines/a: no permission \("):
        Address.parse("gs://spines/a").read_bytes()
    assert google.requests == 1 or status == 401  # gcsfs asks for new credentials
    assert not [record for record in caplog.records if record.name == "gcsfs"]  # no stack, no warning


def test_a_file_that_is_there_is_not_created(google):
    google.status = 412
    assert Address.parse("gs://spines/a").create(b"") is False


def test_a_bucket_that_is_not_there_is_named(google):
    google.status = 404
    with pytest.raises(StoreError, match=r"^gs://none/a: cannot be written"):
        Address.parse("gs://none/a").write_bytes(b"")
    with pytest.raises(StoreError, match=r"^gs://none/a: cannot be listed"):
        Address.parse("gs://none/a").files()
