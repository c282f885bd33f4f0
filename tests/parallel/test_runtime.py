"""What is decided before JAX starts, tried in fresh processes, with whichever jaxlib is installed."""

import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from spinejax.errors import SpinejaxError
from spinejax.parallel import devices, runtime
from tests.running import ROOT

OTHER = "--xla_force_host_platform_device_count=2"
SET_UP = "from spinejax.parallel import runtime; runtime.set_up(); "


def run(program, **env):
    """The standard output of a Python program in this checkout, without the settings of this test run."""
    ours = ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR", "MALLOC_")
    plain = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, env=plain | env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def cpu_machine(monkeypatch, tmp_path):
    """This process as on a machine without accelerators; other tests have compiled in it already."""
    monkeypatch.setattr(runtime, "_plugins", list)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    monkeypatch.setattr(runtime, "_keep_freed_memory", lambda: None)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)


def flags_after_set_up(monkeypatch, before, **options):
    monkeypatch.setenv("XLA_FLAGS", before)
    runtime.set_up(**options)
    return os.environ["XLA_FLAGS"].split()


def test_the_flag_is_added_to_the_users_own_wherever_xla_knows_it(cpu_machine, monkeypatch):
    known = runtime._is_known(runtime.QUICK_CPU_CONVOLUTIONS)
    assert flags_after_set_up(monkeypatch, OTHER) == [OTHER] + [runtime.QUICK_CPU_CONVOLUTIONS] * known


def test_a_users_own_choice_stays(cpu_machine, monkeypatch):
    own = "--xla_cpu_experimental_ynn_fusion_type=invalid"
    assert flags_after_set_up(monkeypatch, own) == [own]


def test_an_unknown_flag_is_not_set_and_each_flag_is_tried_once(cpu_machine, monkeypatch):
    monkeypatch.setattr(runtime, "QUICK_CPU_CONVOLUTIONS", "--xla_no_such_flag=1")
    assert flags_after_set_up(monkeypatch, OTHER) == [OTHER]
    assert runtime._is_known(OTHER)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("tried again"))
    assert flags_after_set_up(monkeypatch, OTHER) == [OTHER]
    assert runtime._is_known(OTHER)


def test_another_version_of_jaxlib_is_tried_anew(cpu_machine, monkeypatch):
    assert runtime._is_known(OTHER)
    monkeypatch.setattr(runtime.jaxlib, "__version__", "9.9.9")
    tried = []

    def refused(command, **options):
        tried.append(options["env"]["XLA_FLAGS"])
        return subprocess.CompletedProcess(command, 1, b"", b"Unknown flag in XLA_FLAGS")

    monkeypatch.setattr(subprocess, "run", refused)
    assert not runtime._is_known(OTHER)
    assert tried == [OTHER]


@pytest.mark.parametrize(
    ("platforms", "plugins", "on_cpu"),
    [("cpu", ["cuda"], True), ("cuda,cpu", ["cuda"], False), ("", [], True), ("tpu", [], False)],
)
def test_cpu_settings_are_made_where_jax_computes_on_cpus(cpu_machine, monkeypatch, platforms, plugins, on_cpu):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.setattr(runtime, "_plugins", lambda: plugins)
    monkeypatch.setattr(runtime, "_is_known", lambda flag: True)
    kept = []
    monkeypatch.setattr(runtime, "_keep_freed_memory", lambda: kept.append(True))
    assert bool(runtime.on_cpu()) == on_cpu
    assert flags_after_set_up(monkeypatch, OTHER) == [OTHER] + [runtime.QUICK_CPU_CONVOLUTIONS] * on_cpu
    assert kept == [True] * on_cpu


@pytest.mark.skipif(sys.platform != "linux", reason="devices are looked for as Linux names them")
def test_an_idle_plugin_on_a_machine_without_its_device_counts_as_cpu(cpu_machine, monkeypatch):
    monkeypatch.setattr(runtime, "_plugins", lambda: ["cuda"])
    monkeypatch.setattr(runtime, "_DEVICE_FILES", ("no-such-device*",))
    assert runtime.on_cpu()
    monkeypatch.setattr(runtime, "_DEVICE_FILES", ("null",))
    assert not runtime.on_cpu()


def test_deterministic_sets_the_flags_that_xla_knows(cpu_machine, monkeypatch):
    flags = flags_after_set_up(monkeypatch, "", deterministic=True)
    assert flags[-1:] == ["--xla_gpu_autotune_level=0"] or not runtime._is_known("--xla_gpu_autotune_level=0")
    assert "--xla_gpu_deterministic_ops=true" in flags
    assert not any("xla_gpu" in flag for flag in flags_after_set_up(monkeypatch, ""))


@pytest.mark.parametrize("on_cpu", [True, False])
def test_accelerators_multiply_as_precisely_as_asked(cpu_machine, monkeypatch, on_cpu):
    changes = {}
    monkeypatch.setattr(jax.config, "update", changes.__setitem__)
    monkeypatch.setattr(runtime, "on_cpu", lambda: on_cpu)
    monkeypatch.setattr(runtime, "QUICK_CPU_CONVOLUTIONS", OTHER)
    for options, precision in (({}, "float32"), ({"precision": "bfloat16"}, "bfloat16")):
        runtime.set_up(**options)
        assert changes.get("jax_default_matmul_precision") == (None if on_cpu else precision)


def test_importing_the_library_changes_nothing_and_jax_starts_with_what_set_up_chose(tmp_path):
    program = "import os, spinejax; from spinejax.commands import train; print(os.environ.get('XLA_FLAGS')); "
    program += SET_UP + "import jax; print(jax.numpy.ones(2).sum())"
    assert run(program, XDG_CACHE_HOME=str(tmp_path)).splitlines() == ["None", "2.0"]
    assert (tmp_path / "spinejax" / "compiled").is_dir()


def test_jax_enable_x64_is_switched_off():
    program = "import jax; print(jax.numpy.ones(2, float).dtype)"
    assert run(SET_UP + program, JAX_ENABLE_X64="1") == "float32"


def test_without_a_home_nothing_is_cached_and_nothing_left_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert runtime.cache_folder() is None
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert runtime.cache_folder() is None
    assert [path.name for path in Path().iterdir()] == ["file"]


def test_a_platform_that_is_not_there_is_one_message(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    for error in (AssertionError(), RuntimeError("Unable to initialize backend 'cuda': no device\nmore")):

        def refuse(error=error):
            raise error

        monkeypatch.setattr(jax, "devices", refuse)
        with pytest.raises(SpinejaxError, match=r"^JAX_PLATFORMS is cuda, which JAX cannot use .* \(.+\)\. Unset it"):
            devices.make_mesh()


@pytest.mark.parametrize("command", [("train.py", "quickstart", "--workdir"), ("evaluate.py", "--checkpoint")])
@pytest.mark.parametrize("name", ["cuda", "no-such-platform"])
def test_a_command_on_a_platform_that_is_not_there_ends_with_one_line_and_status_2(command, name, tmp_path):
    command = [sys.executable, *command, str(tmp_path / "run"), "--data", str(tmp_path / "data")]
    env = os.environ | {"JAX_PLATFORMS": name, "XLA_FLAGS": ""}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: JAX_PLATFORMS is {name}, which JAX cannot use on this machine")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_a_large_buffer_gets_the_memory_of_the_last_one():
    program = """
import ctypes, resource
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: faults are of small pages, whatever the machine is set to
import numpy as np
np.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    np.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    plain, set_up = (int(run(first + program, JAX_PLATFORMS="cpu")) for first in ("", SET_UP))
    assert plain > 4 * 2**27 / resource.getpagesize() / 2  # else the comparison would show nothing
    assert set_up < plain / 100
