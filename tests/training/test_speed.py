"""How well the devices are used: counted operations over the vendor's figure, and traces that open."""

import gzip
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spinejax.errors import SpinejaxError
from spinejax.training import speed


@pytest.mark.parametrize(
    ("kind", "dtype", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989e12),
        ("NVIDIA A100-SXM4-40GB", "tensorfloat32", 156e12),
        ("NVIDIA A100-SXM4-40GB", "float32", 19.5e12),
        ("TPU v5 lite", "bfloat16", 197e12),
        ("TPU v5 lite", "float32", None),
        ("cpu", "float32", None),
    ],
)
def test_the_peak_rate_is_that_of_the_devices_kind_and_precision(kind, dtype, peak):
    assert speed.peak_flops(kind, dtype) == peak


def lowered():
    """A product of 2 · 8 · 16 · 4 operations."""
    return jax.jit(jnp.matmul).lower(jnp.ones((8, 16)), jnp.ones((16, 4)))


def test_utilisation_is_the_counted_share_of_what_all_devices_can_do(monkeypatch):
    assert speed.Utilisation(lambda: pytest.fail("counted for nothing"), "float32").at(5) is None
    monkeypatch.setitem(speed.PEAK_TERAFLOPS, jax.devices()[0].device_kind, {"float32": 1e-6})
    np.testing.assert_allclose(speed.Utilisation(lowered, "float32").at(5), 5 * 1024 / (1e6 * jax.device_count()))


def test_memory_is_counted():
    assert speed.peak_memory_mb() > 10


@pytest.mark.parametrize("text", ["", "3", "3:3", "4:3", "-1:3", "a:b", "1:2:3"])
def test_steps_that_are_no_steps_are_refused(text):
    with pytest.raises(SpinejaxError, match=r"--profile is .*expected FROM:TO"):
        speed.parse_steps(text)
    assert speed.parse_steps("3:5") == range(3, 5)


def events(folder):
    (path,) = folder.rglob("perfetto_trace.json.gz")
    return json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]


@pytest.mark.parametrize("num_steps", [6, 4])
def test_the_asked_steps_are_traced_even_if_the_run_ends_before_the_last(tmp_path, num_steps):
    with speed.traced(lambda state, batch: (state + batch, {}), 10, range(12, 15), tmp_path) as step:
        state = 0
        for _ in range(num_steps):
            state, _ = step(state, 2)
    assert state == 2 * num_steps
    numbers = {int(each["args"]["step_num"]) for each in events(tmp_path) if "step_num" in each.get("args", {})}
    assert numbers == set(range(12, min(15, 10 + num_steps)))
    assert list(tmp_path.rglob("*.xplane.pb"))  # what TensorBoard's plugin opens


def test_no_step_of_those_that_are_traced_is_no_trace(tmp_path):
    with speed.traced(lambda state, batch: (state, {}), 20, range(12, 15), tmp_path) as step:
        step(0, 0)
    assert not list(tmp_path.iterdir())


def test_each_layer_has_its_name_in_the_program(network):
    model, variables = network
    text = jax.jit(model.apply).lower(variables, jnp.zeros((1, 112, 224, 9))).as_text(debug_info=True)
    for layer in ("trunk/conv1", "trunk/conv5", "head_side/fc6", "head_side/fc8"):
        assert layer in text
