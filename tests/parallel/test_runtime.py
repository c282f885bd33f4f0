import os
import platform
import resource
import subprocess
import sys

import jax
import jaxlib
import pytest

from spinejax.parallel import runtime

OTHER = "--xla_force_host_platform_device_count=2"


@pytest.fixture(autouse=True)
def plain_machine(monkeypatch):
    monkeypatch.setattr(runtime, "_has_accelerator_plugin", lambda: False)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)  # other tests compile in this process


def flags_after_set_up(monkeypatch, before):
    monkeypatch.setenv("XLA_FLAGS", before)
    runtime.set_up()
    return os.environ["XLA_FLAGS"]


def test_cpu_kernels_are_chosen_beside_the_users_other_flags(monkeypatch):
    assert flags_after_set_up(monkeypatch, OTHER).split() == [OTHER, runtime.QUICK_CPU_CONVOLUTIONS]


def test_a_users_own_choice_stands(monkeypatch):
    own = "--xla_cpu_experimental_ynn_fusion_type=invalid"
    assert flags_after_set_up(monkeypatch, own) == own


def test_nothing_is_chosen_that_another_xla_may_not_know(monkeypatch):
    with monkeypatch.context() as other:
        other.setattr(jaxlib, "__version__", "9.9.9")
        assert flags_after_set_up(other, OTHER) == OTHER
    monkeypatch.setattr(runtime, "_has_accelerator_plugin", lambda: True)
    assert flags_after_set_up(monkeypatch, OTHER) == OTHER


@pytest.mark.skipif(jaxlib.__version__ not in runtime.KNOWN_TO_HAVE_THEM, reason="another jaxlib than that measured")
def test_xla_knows_the_flag():
    program = "from spinejax import devices; runtime.set_up(); import jax; print(jax.numpy.ones(2).sum())"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "2.0\n"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_a_large_buffer_gets_the_memory_of_the_last_one():
    program = """
import ctypes, resource, sys
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: faults are of small pages, whatever the machine is set to
import numpy as np
from spinejax import devices
if sys.argv[1:]:
    runtime.set_up()
np.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    np.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    command = [sys.executable, "-c", program]
    own_choice = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    plain, set_up = (
        int(subprocess.run([*command, *more], env=own_choice, capture_output=True, text=True).stdout)
        for more in ([], ["set up"])
    )
    assert plain > 4 * 2**27 / resource.getpagesize() / 2  # else the comparison would say nothing
    assert set_up < plain / 100
