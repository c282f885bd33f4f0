"""Strictness lives here, so that users pay nothing for it: eight devices, no silent promotion of ranks or dtypes, and
arguments and results checked against their annotations.
"""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "agg")

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from beartype import BeartypeConf, FrozenDict, beartype

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
# What runs within the tests is small: compiling takes longer than running. Commands are started as users start them.
jax.config.update("jax_disable_most_optimizations", True)

# An int is a float too, and numpy's numbers are numbers.
_NUMBERS = {bool: bool | np.bool_, int: int | np.integer, float: float | int | np.floating | np.integer}
typechecker = beartype(conf=BeartypeConf(hint_overrides=FrozenDict(_NUMBERS)))
jaxtyping.install_import_hook(["spinejax", "data_prep"], "conftest.typechecker")  # before anything of ours is imported


@pytest.fixture(autouse=True)
def names_for_doctests(doctest_namespace):
    from spinejax.tasks import UNLABELLED, Task

    doctest_namespace.update(jax=jax, jnp=jnp, np=np, Task=Task, UNLABELLED=UNLABELLED)
