"""Strictness lives here, so that users pay nothing for it: eight devices, no silent promotion of ranks or dtypes."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "agg")

import jax
import jax.numpy as jnp
import numpy as np
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture(autouse=True)
def names_for_doctests(doctest_namespace):
    from spinejax.tasks import UNLABELLED, Task

    doctest_namespace.update(jax=jax, jnp=jnp, np=np, Task=Task, UNLABELLED=UNLABELLED)
