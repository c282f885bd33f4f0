"""An S3 server on this machine (moto's), whose answers can be made slow, wrong or cut short while it runs."""

import contextlib
import threading
import time

import boto3
import fsspec
import pytest
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

ACCOUNT = {"AWS_ACCESS_KEY_ID": "tests", "AWS_SECRET_ACCESS_KEY": "tests", "AWS_DEFAULT_REGION": "us-east-1"}


class Quiet(WSGIRequestHandler):
    def log(self, *_):
        pass


class ObjectStore:
    """The server. `fault`, if it is set, is called as (environ, answer) and may answer in place of the store."""

    def __init__(self, port=0):
        self._app = DomainDispatcherApplication(create_backend_app)
        self.fault, self.requests = None, []
        self._server = make_server("127.0.0.1", port, self._serve, threaded=True, request_handler=Quiet)
        self.port = self._server.port
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def _serve(self, environ, start_response):
        self.requests.append((environ["REQUEST_METHOD"], environ["PATH_INFO"]))

        def answer():
            return self._app(environ, start_response)

        bare = environ["REQUEST_METHOD"] == "HEAD"  # a client may take the body of its answer for garbage
        environ["answer_with"] = lambda status, body=b"": _answer(start_response, status, b"" if bare else body)
        return self.fault(environ, answer) if self.fault else answer()

    @property
    def environment(self):
        return ACCOUNT | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}"}

    @contextlib.contextmanager
    def faulty(self, fault):
        """While the block runs, requests go through `fault`."""
        self.fault = fault
        try:
            yield
        finally:
            self.fault = None

    def client(self):
        return boto3.client("s3", endpoint_url=self.environment["AWS_ENDPOINT_URL"])

    def names(self, bucket, folder=""):
        """The names of all objects below a folder of a bucket."""
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=folder)
        return {one["Key"] for page in pages for one in page.get("Contents", [])}

    def put(self, folder, bucket, name):
        """Put a folder of this machine into a bucket."""
        client = self.client()
        for path in folder.rglob("*"):
            if path.is_file():
                client.upload_file(str(path), bucket, f"{name}/{path.relative_to(folder).as_posix()}")

    def close(self):
        self._server.shutdown()
        self._server.server_close()


def _answer(start_response, status, body):
    start_response(status, [("Content-Length", str(len(body)))])
    return [body]


@pytest.fixture(scope="module")
def store():
    """A server for the tests of a file; the environment leads there."""
    store = ObjectStore()
    with pytest.MonkeyPatch.context() as environment:
        for name, value in store.environment.items():
            environment.setenv(name, value)
        fsspec.get_filesystem_class("s3").clear_instance_cache()  # an earlier server's address
        yield store
    store.close()


@pytest.fixture
def bucket(store, request):
    """The name of a new bucket."""
    name = f"bucket-{abs(hash(request.node.nodeid))}"
    store.client().create_bucket(Bucket=name)
    return name


# Faults --------------------------------------------------------------------------------------------------------------


def is_object(environ):
    """Whether a request is about an object, not a bucket."""
    return environ["PATH_INFO"].strip("/").count("/") > 0


def slow(environ, answer):
    time.sleep(0.3)
    return answer()


def sometimes(fault, every=2, methods=("GET", "PUT")):
    """A fault of every second request about an object, and so on."""
    count = 0
    lock = threading.Lock()

    def some(environ, answer):
        nonlocal count
        if not is_object(environ) or environ["REQUEST_METHOD"] not in methods:
            return answer()
        with lock:
            count += 1
            now = count % every == 0
        return fault(environ, answer) if now else answer()

    return some


def unavailable(environ, answer):
    return environ["answer_with"]("503 Service Unavailable", b"<Error><Code>ServiceUnavailable</Code></Error>")


def forbidden(environ, answer):
    return environ["answer_with"]("403 Forbidden", b"<Error><Code>AccessDenied</Code><Message>no</Message></Error>")


def cut_short(environ, answer):
    """Half of what was announced, and then nothing."""
    body = b"".join(answer())
    return [body[: len(body) // 2]]


def flipped(environ, answer):
    """One bit of an answer's body is another one."""
    body = bytearray(b"".join(answer()))
    if body:
        body[len(body) // 2] ^= 1
    return [bytes(body)]


def vanishes(environ, answer):
    """A write is confirmed, and is not there."""
    return environ["answer_with"]("200 OK")
