"""What tests of several folders start from: a small data set, an untrained network, and a launcher of commands.

The data set is quick to make: bright squares whose place and size are the grades.
"""

import contextlib

import numpy as np
import pytest

from spinejax.data.manifest import write_manifest
from spinejax.data.shards import Disc, shard_name, write_shard
from spinejax.geometry import VOLUME_SHAPE
from spinejax.tasks import LEVELS, UNLABELLED, Task

TASKS = (Task("brightness", ("dark", "grey", "bright")), Task("side", ("front", "back")))


def a_disc(rng, patient, level, split, **changes):
    """A noisy disc volume whose central square has a brightness and a side."""
    labels = {"brightness": int(rng.integers(3)), "side": int(rng.integers(2))}
    volume = rng.integers(20000, 24000, VOLUME_SHAPE, dtype=np.uint16)
    column = 110 if labels["side"] == 0 else 170
    volume[70:122, column : column + 40] = 8000 + 24000 * labels["brightness"]
    volume[:, :, :2] = 0
    volume[:, :, 13:] = 0
    if rng.random() < 0.1:
        labels["side"] = UNLABELLED
    fields = {
        "volume": volume,
        "affine": np.diag([0.3, 0.3, 4.0, 1.0]),
        "slices": (2, 13),
        "labels": labels,
        "level": level,
        "patient": patient,
        "scan": f"{patient}-t2",
        "split": split,
    }
    return Disc(**(fields | changes))


def write_tiny(folder, *, num_patients=(8, 2, 2), levels=LEVELS[-3:], num_shards=2, masks=(), seed=0):
    """A data set of `num_patients` per split with a disc at each of `levels`."""
    rng = np.random.default_rng(seed)
    splits = np.repeat(["train", "validation", "test"], num_patients)
    discs = [
        a_disc(rng, f"p{number:03d}", level, str(split)) for number, split in enumerate(splits) for level in levels
    ]
    folder.mkdir(parents=True, exist_ok=True)
    summaries = [
        write_shard(folder / shard_name(i, num_shards), discs[i::num_shards], TASKS, masks) for i in range(num_shards)
    ]
    write_manifest(folder, summaries, TASKS, {"source": "test"}, masks)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The folder of a data set: 24 training, 6 validation and 6 test discs. Not to be written to."""
    return write_tiny(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="session")
def network():
    """A small untrained network for `TASKS`, and its variables."""
    import jax

    from spinejax.config import Config
    from spinejax.training import train_step

    config = Config(width=0.02, initialiser="he")
    model = train_step.make_model(config, TASKS)
    state = train_step.init(jax.random.key(0), model, config, np.full(9, 0.3, np.float32))
    return model, {"params": state.params, "constants": state.constants}


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """A folder in which the commands of all tests keep what they compile."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def launcher(tmp_path_factory, compiled):
    """Starts commands, as `tests.running` says; in the environment that it finds."""
    from tests.running import Launcher

    with contextlib.closing(Launcher(tmp_path_factory.mktemp("launcher"), compiled)) as started:
        yield started
