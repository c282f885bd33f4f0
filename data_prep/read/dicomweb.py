"""Studies from a DICOMweb server (PS3.18), and results to one, with dicomweb-client.

`dicomweb://HOST[:PORT]/PATH/studies/UID` names a study, with `/series/UID` after it one series; `dicomwebs://` is the
same by TLS. Name and password come from DICOMWEB_USER and DICOMWEB_PASSWORD, a token from DICOMWEB_TOKEN, or else from
~/.netrc: an address with a password in it is refused, because others can read command lines and logs.
"""

import contextlib
import logging
import os
import re
import signal
import tempfile
import threading
import warnings
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_prep.read.dicom_files import import_pydicom
from spinejax.errors import SpinejaxError, needs
from spinejax.files.addresses import is_study_address

_STUDY = re.compile(r"(.+)/studies/([0-9.]{1,64})(?:/series/([0-9.]{1,64}))?/?")
_TIMEOUT_S = (10, 300)  # to connect; between two parts of an answer
_ATTEMPTS = 3  # where a server says that it is busy
_OF_ONE_OBJECT = (400, 409, 413, 415, 422)  # states of HTTP that say nothing about the next object
_REASONS = {  # PS3.18, 10.5.3, and PS3.4, C.4.2.1.4
    0x0110: "processing failure", 0x0117: "invalid object", 0x0122: "SOP class not supported",
    0x0124: "not authorised", 0x0111: "there already, with other content", 0xA700: "out of resources",
    0xA900: "not of its SOP class", 0xC000: "cannot be understood",
}  # fmt: skip


@contextlib.contextmanager
def fetched(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """The paths, with a folder of files instead of each address of a study; the folders are deleted in the end.

    Raises:
        SpinejaxError: an address is malformed, its server cannot be reached, or refuses; dicomweb-client is missing.
    """
    if not any(map(is_study_address, map(str, paths))):
        yield list(paths)
        return
    with _deleted_when_ended(), tempfile.TemporaryDirectory(prefix="spinejax-study-") as folder:
        yield [
            _fetch(str(path), Path(folder, str(number))) if is_study_address(str(path)) else path
            for number, path in enumerate(paths)
        ]


@contextlib.contextmanager
def _deleted_when_ended() -> Iterator[None]:
    """Let the signals that end a process raise an exception, so that what it fetched is deleted."""

    def end(number, _):
        raise SystemExit(128 + number)

    numbers = [signal.SIGTERM, signal.SIGHUP] if threading.current_thread() is threading.main_thread() else []
    before = {number: signal.signal(number, end) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _fetch(address: str, folder: Path) -> Path:
    parts = _STUDY.fullmatch(re.sub(r"^(dicomwebs?):/+", r"\1://", address))
    if parts is None:
        raise SpinejaxError(f"{_shown(address)}: expected dicomweb://HOST/PATH/studies/UID, or dicomwebs:// for TLS.")
    root, study, series = parts.groups()
    folder = folder / study  # names the study in messages
    folder.mkdir(parents=True)
    with _one_line(root, f"study {study}"), _client(root) as client:
        whole = {"media_types": (("application/dicom", "*"),)}  # as stored, packed or not
        images = client.iter_series(study, series, **whole) if series else client.iter_study(study, **whole)
        count = 0
        for count, image in enumerate(images, start=1):
            image.save_as(folder / f"{count:05d}.dcm")
    if not count:
        raise SpinejaxError(f"{_shown(root)}: study {study} has no images there.")
    return folder


def store(address: str, files: Sequence[Path]) -> tuple[int, dict[str, str]]:
    """Send DICOM files to a server, one request each (STOW-RS).

    Returns:
        How many the server stored, and for each other file why not.

    Raises:
        SpinejaxError: the server cannot be reached, or refuses all.
    """
    pydicom = import_pydicom()
    sent, failures = 0, {}
    # In one piece: of objects in chunks, some servers say that they are stored, and lose them.
    with _client(address, chunk_bytes=1 << 31) as client:
        for path in files:
            with _one_line(address, f"{sent} of {len(files)} objects were sent"):
                reason = _store_one(client, pydicom.dcmread(path))
            if reason:
                failures[f"{path.parent.name}/{path.name}"] = f"{_shown(address)} did not store it: {reason}."
            else:
                sent += 1
    return sent, failures


def check_server(address: str) -> None:
    """Raises SpinejaxError if this can be no server's address, or dicomweb-client is missing."""
    with _client(address):
        pass


def _store_one(client, image) -> str:
    """Why the server did not store an object; empty if it did."""
    import requests

    try:
        answer = client.store_instances([image])
    except requests.HTTPError as error:
        refusal = error.response
        if refusal is None or refusal.status_code not in _OF_ONE_OBJECT:
            raise
        try:
            answer = import_pydicom().Dataset.from_json(refusal.json())
        except Exception:  # the body of a refusal may be anything
            return f"status {refusal.status_code}"
        if not answer.get("FailedSOPSequence"):
            return f"status {refusal.status_code}"
    for item in answer.get("FailedSOPSequence") or ():
        reason = int(item.get("FailureReason") or 0)
        return f"{_REASONS.get(reason, 'failure')} ({reason:04X}H)"
    stored = [item.get("ReferencedSOPInstanceUID") for item in answer.get("ReferencedSOPSequence") or ()]
    return "" if image.SOPInstanceUID in stored else "its answer does not say that it is stored"


# The server ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _client(root: str, chunk_bytes: int = 1 << 20) -> Iterator:
    """A client of the server. More than `chunk_bytes` are sent, and answers read, in chunks."""
    with needs("A DICOMweb server needs dicomweb-client", "dicomweb"):
        import requests
        from dicomweb_client.web import DICOMwebClient
    root = re.sub(r"^dicomweb(s?)://", r"http\1://", root).rstrip("/").removesuffix("/studies")
    if not re.fullmatch(r"https?://[^/@\s?#]+(/[^@\s?#]*)?", root):
        raise SpinejaxError(
            f"{_shown(root)}: expected http://HOST/PATH or https://HOST/PATH. Name and password belong into the "
            "environment (DICOMWEB_USER, DICOMWEB_PASSWORD) or ~/.netrc."
        )
    session = requests.Session()
    user, password, token = (os.environ.get(f"DICOMWEB_{name}") for name in ("USER", "PASSWORD", "TOKEN"))
    if token:

        def authorise(request):  # a mere header would give way to ~/.netrc
            request.headers["Authorization"] = f"Bearer {token}"
            return request

        session.auth = authorise
    elif user:
        session.auth = (user, password or "")
    for library in ("dicomweb_client", "retrying"):
        logging.getLogger(library).setLevel(logging.CRITICAL)  # what they warn of is in our messages
    answers: weakref.WeakSet = weakref.WeakSet()

    def heard(response, *_, **__):
        answers.add(response)
        kind = response.headers.get("Content-Type", "")
        if "json" in kind:  # it may name its character set, which dicomweb-client takes for another media type
            response.headers["Content-Type"] = kind.partition(";")[0].strip()
        return response

    client = DICOMwebClient(root, session=session, timeout=_TIMEOUT_S, callback=heard, chunk_size=chunk_bytes)
    client.set_http_retry_params(max_attempts=_ATTEMPTS)
    with session:
        try:
            yield client
        finally:
            for answer in list(answers):  # one that was not understood was not read to its end: its connection is open
                answer.close()


def _shown(address: str) -> str:
    """An address without a name or password that it may have."""
    return re.sub(r"//[^/]*@", "//…@", address)


@contextlib.contextmanager
def _one_line(root: str, what: str) -> Iterator[None]:
    """Turn what a server or the way to it may do into one line."""
    with needs("A DICOMweb server needs dicomweb-client", "dicomweb"):
        import requests
        import retrying

    root = _shown(root)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pydicom, for values that the readers judge
            yield
    except (SpinejaxError, OSError) as error:
        if not isinstance(error, requests.RequestException):
            raise
        answer = error.response
        if answer is not None:
            answer.close()
        if answer is not None and answer.status_code in (401, 403):
            cure = "Give DICOMWEB_USER and DICOMWEB_PASSWORD, DICOMWEB_TOKEN, or an entry in ~/.netrc"
            raise SpinejaxError(f"{root}: access is denied ({answer.status_code}; {what}). {cure}.") from error
        if answer is not None and answer.status_code == 404:
            raise SpinejaxError(f"{root}: not there (404; {what}). Check the address and the UID.") from error
        if answer is not None:
            raise SpinejaxError(f"{root}: the server answered {answer.status_code} ({what}).") from error
        if isinstance(error, requests.Timeout):
            raise SpinejaxError(f"{root}: no answer in time ({what}). Try again later.") from error
        if isinstance(error, requests.exceptions.SSLError):
            cure = "Name your authority's file in REQUESTS_CA_BUNDLE"
            raise SpinejaxError(f"{root}: its certificate is not trusted ({what}). {cure}.") from error
        raise SpinejaxError(f"{root}: no connection, or it broke off ({what}). Is the server up?") from error
    except retrying.RetryError as error:
        raise SpinejaxError(f"{root}: the server is busy or failing ({what}). Try again later.") from error
    except Exception as error:  # an answer that is no DICOM
        reason = " ".join(str(error).split())[:120].rstrip(".") or type(error).__name__
        raise SpinejaxError(f"{root}: the answer is not DICOMweb ({what}; {reason}). Check the address.") from error
