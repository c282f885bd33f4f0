"""What other JAX code calls: load a trained network, grade disc volumes, explain the grades, export the network.

These functions loop over batches, and return numpy arrays, so that memory does not grow with the number of discs on the
device. Under a transformation of JAX use what they call: `model.apply`, `inference.predict.predict_step` and
`inference.hotspots.evidence`.
"""

import functools
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from spinejax.errors import NotInstalledError, SpinejaxError
from spinejax.files.atomic import write_atomically
from spinejax.geometry import VOLUME_SHAPE, WINDOW_SHAPE
from spinejax.inference import hotspots, predict
from spinejax.inference.hotspots import Method
from spinejax.network.cpu_kernels import with_cpu_kernels
from spinejax.network.spinenet import XLA, OneDevice, SpineNet
from spinejax.training import checkpoint, shipped

PLATFORMS = ("cpu", "cuda", "tpu")
"""On which an exported network runs."""


class Grades(NamedTuple):
    """The grades of N discs, by task name.

    Args:
        probabilities: of each grade, in the order of `Task.grades`; rows sum to 1.
        spread: how far the views disagree: the standard deviation over them of the most probable grade's probability.
    """

    probabilities: dict[str, Float[np.ndarray, "N C"]]
    spread: dict[str, Float[np.ndarray, " N"]]


def load(path: str | Path | None = None) -> tuple[SpineNet, dict[str, Any]]:
    """A trained network, with its weights on the default device: `model.apply(variables, windows)`.

    Args:
        path: a run (its best step is loaded), an exported folder, or one step's folder, also in a bucket (`s3://…`,
            `gs://…`; extra `cloud`). Default: the network that ships with this package.

    Raises:
        SpinejaxError: there is no checkpoint, or it is damaged, or made by a later version.

    Example:
        >>> model, variables = load()
        >>> scores = model.apply(variables, jnp.zeros((1, 112, 224, 9)))
        >>> model, variables = load("runs/quickstart/run")  # doctest: +SKIP
        >>> scores = model.apply(variables, windows)  # doctest: +SKIP
    """
    model, variables = checkpoint.load(shipped.FOLDER if path is None else path)
    return model, jax.device_put(variables)


def grade(
    model: SpineNet,
    variables: Mapping[str, Any],
    volumes: Shaped[Array | np.ndarray, "..."],
    *,
    tta: bool = True,
    batch_size: int = 32,
) -> Grades:
    """Grade discs: one forward pass, or the paper's average over 54 views (Sect. 4).

    Args:
        model, variables: the network.
        volumes: uint16[N, 192, 320, 15], as `DataSet.volumes` reads them; 65535 is intensity 1.
        tta: average over the 54 views; if not, grade the identity view, and the spread is 0.
        batch_size: discs on the device at once.

    Raises:
        SpinejaxError: the volumes have another shape or dtype, or `batch_size` is below 1.

    Example:
        >>> model = SpineNet((Task("narrowing", ("no", "yes")),), width=0.02)
        >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 112, 224, 9)))
        >>> probabilities, spread = grade(model, variables, np.zeros((3, 192, 320, 15), np.uint16), tta=False)
        >>> probabilities["narrowing"].shape, spread["narrowing"].shape
        ((3, 2), (3,))
    """
    _check_volumes(volumes)
    if batch_size < 1:
        raise SpinejaxError(f"batch_size is {batch_size}: expected 1 or more.")
    num = len(volumes)
    size = min(batch_size, max(num, 1))
    step = functools.partial(predict.predict_step, model=with_cpu_kernels(model), grid=tta)
    parts = []
    for start in range(0, max(num, 1), size):
        batch = np.asarray(volumes[start : start + size])
        full = np.pad(batch, ((0, size - len(batch)), *[(0, 0)] * 3))  # one shape, so that one program serves all
        found = step(variables, full, predict.view_set(tta))
        parts.append(jax.tree.map(lambda each, kept=len(batch): np.asarray(each)[:kept], found))
    return Grades(*jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts))


def explain(
    model: SpineNet,
    variables: Mapping[str, Any],
    volumes: Shaped[Array | np.ndarray, "..."],
    grades: Mapping[str, Any] | None = None,
    *,
    method: Method = Method(),
    seed: int = 0,
) -> dict[str, Float[np.ndarray, "N 112 224 9"]]:
    """Evidence hotspots: how much each pixel of the central window moves the score of a grade (paper, Sect. 3).

    Args:
        model, variables: the network.
        volumes: uint16[N, 192, 320, 15], as for `grade`. Slices that are all zero count as outside the scan.
        grades: task name → the grade whose score is traced back, as an index into `Task.grades`: one for all discs, or
            int[N]. For tasks that are not named, it is each disc's most probable grade by `grade`.
        method: how maps are made.
        seed: decides the random views.

    Returns:
        Maps by task name, ≥ 0 unless `method.signed`.

    Raises:
        SpinejaxError: the volumes have another shape or dtype, or a task or grade is not the network's.

    Example:
        >>> model = SpineNet((Task("narrowing", ("no", "yes")),), width=0.02)
        >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 112, 224, 9)))
        >>> volumes = np.zeros((1, 192, 320, 15), np.uint16)
        >>> explain(model, variables, volumes, {"narrowing": 1}, method=Method(num_views=1))["narrowing"].shape
        (1, 112, 224, 9)
    """
    _check_volumes(volumes)
    traced = _grades_to_trace(model, variables, volumes, grades or {})
    maps = np.zeros((len(volumes), len(model.tasks), *WINDOW_SHAPE), np.float32)
    for row in range(len(volumes)):
        volume = np.asarray(volumes[row])
        in_scan = np.flatnonzero(volume.any((0, 1)))
        first, last = np.min(in_scan, initial=VOLUME_SHAPE[2]), np.max(in_scan, initial=-1)
        batch = {
            "volume": volume[None],
            "slices": np.array([[first, last + 1]], np.int32),
            "grades": traced[row, None],
            "row": np.array([row], np.int32),
        }
        key, network = jax.random.key(seed), with_cpu_kernels(model)
        maps[row] = hotspots.hotspot_step(key, variables, batch, model=network, method=method)[0]
    return {task.name: maps[:, column] for column, task in enumerate(model.tasks)}


def export(model: SpineNet, variables: Mapping[str, Any], path: str | Path) -> Path:
    """Write a network as one file that needs only JAX to run: StableHLO with the weights inside.

    The file's function takes float32[N, 112, 224, 9], windows of any number of discs with intensities in [0, 1], and
    returns each task's grade probabilities, task name → float32[N, C]. It runs on CPUs, NVIDIA GPUs and TPUs::

        exported = jax.export.deserialize(Path("spinenet.jax").read_bytes())
        probabilities = exported.call(windows)

    A window is the middle of a disc volume, divided by 65535 (`spinejax.views`). JAX reads such files for at least
    six months after the version that wrote them (docs.jax.dev, "Exporting and serializing").

    Args:
        model, variables: the network.
        path: the file, which is replaced if it exists.

    Raises:
        NotInstalledError: flatbuffers is not installed.
        OSError: the file cannot be written.

    Example:
        >>> model, variables = load("runs/quickstart/run")  # doctest: +SKIP
        >>> export(model, variables, "spinenet.jax")  # doctest: +SKIP
        PosixPath('spinenet.jax')
    """
    if importlib.util.find_spec("flatbuffers") is None:
        raise NotInstalledError("Exporting a network needs flatbuffers", "export")
    portable, weights = model.clone(kernels=XLA, layout=OneDevice()), jax.device_get(variables)

    def probabilities(windows: Float[Array, "N 112 224 S"]) -> dict[str, Float[Array, "N _"]]:
        return jax.tree.map(jax.nn.softmax, portable.apply(weights, windows))

    (num,) = jax.export.symbolic_shape("N")
    windows = jax.ShapeDtypeStruct((num, *WINDOW_SHAPE[:2], model.num_slices), jnp.float32)
    content = jax.export.export(jax.jit(probabilities), platforms=PLATFORMS)(windows).serialize()
    write_atomically(Path(path), lambda temporary: temporary.write_bytes(content))
    return Path(path)


def _check_volumes(volumes: Any) -> None:
    if volumes.ndim != 4 or volumes.shape[1:] != VOLUME_SHAPE or volumes.dtype != np.uint16:
        raise SpinejaxError(
            f"volumes are {volumes.dtype}{list(volumes.shape)}: expected uint16[N, 192, 320, 15], as a data set stores "
            "them (`DataSet.volumes`)."
        )


def _grades_to_trace(
    model: SpineNet, variables: Mapping[str, Any], volumes: Array | np.ndarray, chosen: Mapping[str, Any]
) -> Int[np.ndarray, "N T"]:
    if unknown := sorted(set(chosen) - {task.name for task in model.tasks}):
        names = ", ".join(task.name for task in model.tasks)
        raise SpinejaxError(f"grades: unknown task {', '.join(unknown)}; the network grades {names}.")
    for task in model.tasks:
        given = np.asarray(chosen.get(task.name, 0))
        whole = np.issubdtype(given.dtype, np.integer) and given.shape in ((), (len(volumes),))
        if not whole or ((given < 0) | (given >= task.num_grades)).any():
            raise SpinejaxError(
                f"grades: {task.name} is {given.dtype}{list(given.shape)}, expected one grade, or one per disc, each a "
                f"whole number from 0 to {task.num_grades - 1}."
            )
    if len(chosen) < len(model.tasks):
        most_probable = {name: each.argmax(1) for name, each in grade(model, variables, volumes)[0].items()}
        chosen = most_probable | dict(chosen)
    columns = [np.broadcast_to(np.asarray(chosen[task.name], np.int32), len(volumes)) for task in model.tasks]
    return np.stack(columns, axis=1)
