"""What is said when a device has too little memory."""

import re

import jax
import jax.numpy as jnp
import pytest

from spinejax.errors import SpinejaxError
from spinejax.parallel import memory

FULL = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 123 bytes."


def lower():
    """A product whose sums in float32[1024, 1024], 4.2 MB, are passing; its argument is 4.2 MB as well."""
    argument = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
    return jax.jit(lambda x: jnp.sin(x @ x) @ x.sum(0)).lower(argument)


def said(error, lower, shares, monkeypatch=None, limit=None):
    if limit:
        monkeypatch.setattr(memory, "_limit_bytes", lambda: limit)
    options = {"otherwise": "Buy more.", "also": " Or less."}
    with pytest.raises(SpinejaxError) as raised, memory.advice(lower, "a sum", "--parts", shares, **options):
        raise jax.errors.JaxRuntimeError(error)
    return str(raised.value)


def test_the_mildest_value_that_fits_is_named_and_what_it_leaves(monkeypatch):
    shares = {2: 1 / 2, 4: 1 / 4, 8: 1 / 8}
    found = said(FULL, lower, shares)
    now, then = map(float, re.findall(r"([\d.]+) MB", found))
    assert found.startswith("Out of device memory: a sum takes ")
    assert f"`--parts 2` lowers that to about {then} MB, to the same results. Or less." in found
    assert 4.2 < then < now
    kept = 2 * then - now
    limit = (kept + 0.3 * (now - kept)) * 1e6 / 0.9  # room for a quarter
    found = said(FULL, lower, shares, monkeypatch, limit)
    assert f"on each device of {limit / 1e6:.1f} MB. `--parts 4` lowers" in found
    assert "`--parts 2`" in said(FULL, lower, shares, monkeypatch, 1)  # none fits: a beginning


def test_without_a_smaller_value_it_says_what_else_helps():
    assert said(FULL, lower, {}).endswith(" MB on each device. Buy more.")


def test_what_cannot_be_compiled_either_has_advice_without_sizes():
    def fails():
        raise jax.errors.JaxRuntimeError(FULL)

    begin = "Out of device memory: a sum takes more than a device has."
    assert said(FULL, fails, {2: 0.5}) == f"{begin} `--parts 2` lowers it, to the same results. Or less."
    assert said(FULL, fails, {}) == f"{begin} Buy more."


def test_other_faults_are_unchanged():
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"^INTERNAL"), memory.advice(lower, "", "", {}, otherwise=""):
        raise jax.errors.JaxRuntimeError("INTERNAL: a fault of the compiler")


@pytest.mark.parametrize(
    ("value", "least", "expected"),
    [(32, 1, [16, 8, 4, 2, 1]), (32, 8, [16, 8]), (12, 4, [4]), (8, 8, []), (1, 1, []), (7, 1, [3, 1])],
)
def test_halved_values_are_multiples(value, least, expected):
    assert memory.halved(value, least) == {each: each / value for each in expected}
