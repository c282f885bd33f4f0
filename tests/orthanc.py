"""A real DICOMweb server for tests: Orthanc, where Debian's packages orthanc and orthanc-dicomweb are installed."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest

USER, PASSWORD = "radiology", "correct horse"
_ORTHANC = shutil.which("Orthanc", path=os.environ["PATH"] + ":/usr/sbin")
_PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")

needs_orthanc = pytest.mark.skipif(
    _ORTHANC is None or not _PLUGIN.exists(), reason="no Orthanc here: Debian has orthanc and orthanc-dicomweb"
)


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextlib.contextmanager
def running_orthanc(root):
    """An empty Orthanc with a password, on a free port of this machine alone; its address, without a scheme."""
    port = free_port()
    settings = {
        "StorageDirectory": str(root), "IndexDirectory": str(root), "Plugins": [str(_PLUGIN)], "HttpPort": port,
        "DicomServerEnabled": False, "RemoteAccessAllowed": False, "AuthenticationEnabled": True,
        "RegisteredUsers": {USER: PASSWORD}, "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
    }  # fmt: skip
    (root / "orthanc.json").write_text(json.dumps(settings))
    with open(root / "log", "w") as log:
        server = subprocess.Popen([_ORTHANC, root / "orthanc.json"], stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    try:
        for _ in range(300):
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            assert server.poll() is None, (root / "log").read_text()
            time.sleep(0.1)
        yield f"127.0.0.1:{port}/dicom-web"
    finally:
        server.terminate()
        server.wait(timeout=30)
