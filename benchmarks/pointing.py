"""How well hotspots point at planted lesions, for several ways of making the maps.

    python -m data_prep phantom --out runs/pointing-discs --patients 60 --seed 1000
    python -m benchmarks.pointing --checkpoints runs/quickstart/run --data runs/pointing-discs --json pointing.json

Use phantoms that the network was not trained on. Each lesion counts once, for the task that it was drawn for. The score
traced back is that of the grade that the network gives the disc, right or wrong. Of several networks there is also a
table of their mean.
"""

import functools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import faithfulness
from benchmarks.running import start
from spinejax import config
from spinejax.data.batches import eval_batches
from spinejax.data.dataset import DataSet
from spinejax.errors import require_option
from spinejax.geometry import INTENSITY_STEP, WINDOW_SHAPE, central_window
from spinejax.inference import hotspots, predict
from spinejax.inference.hotspots import IDENTITY_RANGES, Method
from spinejax.metrics import pointing
from spinejax.metrics.grading import Estimate, mean_over_patients
from spinejax.network import views
from spinejax.network.cpu_kernels import with_cpu_kernels
from spinejax.network.spinenet import SpineNet
from spinejax.network.views import ViewRanges
from spinejax.parallel import devices, runtime
from spinejax.report import tables
from spinejax.tasks import Task
from spinejax.training import checkpoint

WEAK = ViewRanges(angle_deg=5, shift_rows_px=8, shift_columns_px=10, shift_slices=0, scale=0.03, intensity=0.03)
WILD = ViewRanges(angle_deg=25, shift_rows_px=36, shift_columns_px=48, shift_slices=3, scale=0.2, intensity=0.15)
PLAIN = Method()
NUM_VIEWS = PLAIN.num_views
AT_ONCE = 16  # views in one call of a compiled program


@dataclass(frozen=True)
class Way:
    """A way of making maps.

    Args:
        ranges: ranges of the random views; None for those of the network's training.
        num_views: numbers of views, one row of the table for each.
        method: warp, sign and noise.
        score: which score is traced back.
        forget: shuffle the network's weights first.
        curves: also measure deletion and insertion, which takes as long as the map.
    """

    ranges: ViewRanges | None = None
    num_views: tuple[int, ...] = (NUM_VIEWS,)
    method: Method = PLAIN
    score: Literal["given", "true", "difference"] = "given"
    forget: bool = False
    curves: bool = False


FULL = "views as in training"
WAYS = {
    FULL: Way(num_views=(1, 2, 4, 8, 16, NUM_VIEWS, 64, 128), curves=True),
    "weak views": Way(ranges=WEAK),
    "the paper's views": Way(ranges=ViewRanges()),
    "wilder views": Way(ranges=WILD),
    "plain gradient": Way(ranges=IDENTITY_RANGES, num_views=(1,), curves=True),
    "SmoothGrad, noise of 0.1": Way(ranges=IDENTITY_RANGES, method=Method(noise=0.1), curves=True),
    "adjoint warp": Way(method=Method(warp="adjoint")),
    "smoothed, σ of 8 pixels": Way(method=Method(smoothing_px=8)),
    "signed maps averaged": Way(method=Method(signed=True)),
    "score of the true grade": Way(score="true"),
    "abnormal less normal score": Way(score="difference"),
    "weights shuffled": Way(forget=True, curves=True),
}

MEASURES = {
    "hit": "peak hits",
    "energy_inside": "energy inside",
    "average_precision": "precision",
    "own_side": "own vertebra",
    "deletion": "deletion",
    "insertion": "insertion",
    "likeness": "rank correlation",
}


@dataclass(frozen=True)
class Arguments:
    """Compare ways of making hotspots on discs with lesion masks."""

    checkpoints: tuple[Path, ...]
    """Trained runs, one table for each, and one of their mean."""
    data: Path
    """Data set of phantoms."""
    split: Literal["train", "validation", "test"] | None = None
    """Use only this split's discs. Default: all."""
    ways: tuple[str, ...] = tuple(WAYS)
    """Rows of the table: names of the ways."""
    num_lesions: int | None = None
    """Use only this number of lesions, drawn at random."""
    json: Path | None = None
    """Also write the results to this file, as JSON."""


@dataclass(frozen=True)
class Lesion:
    """A lesion: its disc's row, its task, the task's column in the data set, and the grade that the network gives."""

    row: int
    task: str
    column: int
    given: int


Measures = Mapping[str, list[dict]]
"""Way → the measures of each lesion."""


def main(arguments: Arguments) -> None:
    """Print one table for each network, and one of their mean."""
    names = [run.name for run in arguments.checkpoints]
    require_option(len(set(names)) == len(names), "checkpoints", " ".join(names), "folders with names of their own")
    runtime.set_up()
    data = DataSet(arguments.data)
    networks: dict[str, Measures] = {}
    for run in arguments.checkpoints:
        networks[run.name] = measures_of_network(run, data, arguments)
        found = tables_of(networks, data)
        show(run.name, found[run.name])
        if arguments.json:
            write(found, arguments.json)
    if len(networks) > 1:
        show(*list(found.items())[-1])


def measures_of_network(run: Path, data: DataSet, arguments: Arguments) -> Measures:
    """A trained network's measures."""
    model, variables = checkpoint.load(run)
    model = with_cpu_kernels(model)
    trained = config.load(run / checkpoint.OPTIONS).views
    lesions = lesions_of(model, variables, data, arguments)
    measures: dict[str, list[dict]] = {}
    started = time.perf_counter()
    for number, lesion in enumerate(lesions, start=1):
        own = single_task_network(model, variables, lesion.task)
        for name, measure in measures_of(lesion, *own, data, trained, arguments.ways):
            measures.setdefault(name, []).append(measure)
        if number % 10 == 0:
            print(f"{run.name}: {number} of {len(lesions)} lesions, {time.perf_counter() - started:.0f} s", flush=True)
    return measures


def tables_of(networks: Mapping[str, Measures], data: DataSet) -> dict[str, dict[str, dict]]:
    """Network → way → task → estimates; of several networks also of their mean."""
    if len(networks) > 1:
        networks = {**networks, f"mean of {len(networks)} networks": mean_of_networks(list(networks.values()))}
    return {run: {way: summarise(each, data) for way, each in ways.items()} for run, ways in networks.items()}


def mean_of_networks(networks: Sequence[Measures]) -> Measures:
    """Each lesion's mean over networks, so that an interval over patients is of the mean; all have the same lesions.

    Rightly graded is a lesion that all networks grade so.
    """

    def mean_of(lesion: Sequence[dict]) -> dict:
        numbers = {name: np.mean([each[name] for each in lesion]) for name in lesion[0] if name not in ("task", "row")}
        return {"task": lesion[0]["task"], "row": lesion[0]["row"], **numbers}

    return {
        way: [mean_of(lesion) for lesion in zip(*(each[way] for each in networks), strict=True)] for way in networks[0]
    }


def write(found: Mapping[str, Mapping[str, Mapping]], path: Path) -> None:
    """All tables, as JSON."""
    content = {run: {way: as_json(tasks) for way, tasks in ways.items()} for run, ways in found.items()}
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")


def lesions_of(model: SpineNet, variables: Mapping, data: DataSet, arguments: Arguments) -> list[Lesion]:
    """Every lesion in view, with the grade that the network gives its disc in one view."""
    local = [task.name for task in model.tasks if task.name.split("_")[0] in pointing.SIDES]
    columns = {name: [task.name for task in data.tasks].index(name) for name in local}
    rows = np.arange(len(data)) if arguments.split is None else data.rows(arguments.split)
    rows = rows[(data.labels[rows][:, list(columns.values())] > 0).any(1)]
    mesh = devices.make_mesh()
    batches = eval_batches(data, rows, [], batch_size=16 * mesh.size)
    parts = [part for _, part, _ in predict.predict(model, variables, batches, mesh)]
    given = {name: np.concatenate([part[name] for part in parts]).argmax(1) for name in local}
    lesions = [
        Lesion(int(row), name, column, int(given[name][place]))
        for place, row in enumerate(rows)
        for name, column in columns.items()
        if data.labels[row, column] > 0 and pointing.lesion_of(data.mask("lesion", row), column).any()
    ]
    kept = np.random.default_rng(0).permutation(len(lesions))[: arguments.num_lesions]
    return [lesions[place] for place in np.sort(kept)]


def single_task_network(model: SpineNet, variables: Mapping, task: str) -> tuple[SpineNet, dict]:
    """The network with one task's branch only, under the same name for all: they share one compiled program."""
    params = variables["params"]
    one_branch = {"trunk": params["trunk"], "head_own": params[f"head_{task}"]}
    return model.clone(tasks=(Task("own", ("normal", "abnormal")),)), {**variables, "params": one_branch}


def measures_of(
    lesion: Lesion, model: SpineNet, variables: Mapping, data: DataSet, trained: ViewRanges, ways: tuple[str, ...]
) -> Iterator[tuple[str, dict]]:
    """The measures of one lesion for each row of the table."""
    volume = data.volume(lesion.row).astype(np.float32) * INTENSITY_STEP
    window = central_window(volume)
    mask = pointing.lesion_of(data.mask("lesion", lesion.row), lesion.column)
    region = central_window(data.mask("region", lesion.row))
    true = int(data.labels[lesion.row, lesion.column])
    remembered = None
    for name in ways:
        way = WAYS[name]
        weights, grade = traced(variables, lesion.given, true, way)
        for num_views, map in maps_of(model, weights, volume, data.slices[lesion.row], grade, lesion.row, way, trained):
            measure = pointing.point(map, mask, data.affine[lesion.row], data.slices[lesion.row])
            measure |= {"own_side": pointing.own_side(lesion.task, map, region)}
            if way.forget and remembered is not None:
                measure["likeness"] = faithfulness.similarity(map, remembered)
            if name == FULL and num_views == NUM_VIEWS:
                remembered = map
            if way.curves and num_views in (1, NUM_VIEWS):
                deleted, inserted = faithfulness.deletion_and_insertion(
                    variables, window, map[None], jnp.array([lesion.given]), model=model
                )
                measure |= {"deletion": float(deleted.mean()), "insertion": float(inserted.mean())}
            about = {"task": lesion.task, "row": lesion.row, "right": lesion.given == true}
            yield (f"{num_views} {name}" if name == FULL else name), measure | about


def traced(variables: Mapping, given: int, true: int, way: Way) -> tuple[Mapping, int]:
    """The weights to use, and the grade whose score is traced back."""
    if way.forget:
        variables = faithfulness.forget(jax.random.key(1), variables)
    if way.score != "difference":
        return variables, true if way.score == "true" else given
    # The difference of two outputs is one output, with the difference of their weights.
    head = variables["params"]["head_own"]
    fc8 = {name: np.stack([leaf[..., 0], leaf[..., 1] - leaf[..., 0]], -1) for name, leaf in head["fc8"].items()}
    return {**variables, "params": {**variables["params"], "head_own": {**head, "fc8": fc8}}}, 1


def maps_of(
    model: SpineNet, variables: Mapping, volume, slices, grade: int, row: int, way: Way, trained: ViewRanges
) -> Iterator[tuple[int, np.ndarray]]:
    """The map of the first n views, for each number n in `way.num_views`, in one pass."""
    most = max(way.num_views)
    view_keys, noise_keys = keys_of(row, -(-most // AT_ONCE) * AT_ONCE)
    chosen = draw(view_keys, way.ranges or trained)
    map, coverage = np.zeros((1, *WINDOW_SHAPE), np.float32), np.zeros(WINDOW_SHAPE, np.float32)
    for first in range(0, most, AT_ONCE):
        keys, some = jax.tree.map(lambda leaf, first=first: leaf[first : first + AT_ONCE], (noise_keys, chosen))
        each = each_view(keys, variables, volume, jnp.array([grade]), some, model=model, method=way.method)
        for count, (added, covered) in enumerate(zip(*jax.tree.map(np.asarray, each), strict=True), start=first + 1):
            map += added
            coverage += covered
            if count in way.num_views:
                of_views = mean(map, coverage, slices.astype(np.int32), smoothing_px=way.method.smoothing_px)
                yield count, np.abs(np.asarray(of_views))[0]


@functools.partial(jax.jit, static_argnames="number")
def keys_of(row: int, number: int) -> tuple[jax.Array, jax.Array]:
    """Keys of a disc's views and of their noise, the same as `hotspots.hotspot_step` derives from key 0."""
    view_keys, noise_key = hotspots.keys_of(jax.random.key(0), row, number)
    return view_keys, jax.vmap(functools.partial(jax.random.fold_in, noise_key))(jnp.arange(number))


draw = jax.jit(jax.vmap(views.sample, in_axes=(0, None)), static_argnums=1)
each_view = jax.jit(hotspots.evidence_of_views, static_argnames=("model", "method"))
mean = jax.jit(hotspots.mean_evidence, static_argnames="smoothing_px")


def summarise(measures: list[dict], data: DataSet) -> dict[str, dict[str, Estimate | int]]:
    """For each task, for "all" and for "rightly graded" lesions: n and each measure with its interval over patients."""
    kinds = {
        "all": measures,
        "rightly graded": [each for each in measures if each["right"] == 1],
        **{task: [each for each in measures if each["task"] == task] for task in sorted({m["task"] for m in measures})},
    }
    names = (*MEASURES, "hit_by_chance", "lesion_share", "right")
    found = {}
    for kind, each in kinds.items():
        patients = data.patient[[m["row"] for m in each]]
        values = {name: np.array([m.get(name, np.nan) for m in each], float) for name in names}
        estimates = {name: mean_over_patients(value, patients) for name, value in values.items()}
        found[kind] = {"n": len(each), "patients": len(set(patients)), **estimates}
    return found


def as_json(tasks: Mapping[str, Mapping]) -> dict:
    """Estimates as dicts, without measures that were not taken."""
    return {
        task: {
            name: value.to_json() if isinstance(value, Estimate) else value
            for name, value in figures.items()
            if not (isinstance(value, Estimate) and np.isnan(value.value))
        }
        for task, figures in tasks.items()
    }


def show(run: str, found: Mapping[str, Mapping]) -> None:
    """Print a table of all lesions, and one of each task with the full method."""
    console = Console(width=190)
    some = next(iter(found.values()))
    title = f"{run}: {some['all']['n']} lesions of {some['all']['patients']} patients, % [95 % interval over patients]"
    table = Table("maps", *MEASURES.values(), title=title, title_justify="left")
    for way, tasks in found.items():
        table.add_row(way, *(tables.percent(tasks["all"][name]) for name in MEASURES))
    console.print(table)
    tasks = [name for name in some if name not in ("all", "rightly graded")]
    table = Table("peak hits", *(f"{name} (n = {some[name]['n']})" for name in [*tasks, "rightly graded"]))
    for way, kinds in found.items():
        table.add_row(way, *(tables.percent(kinds[name]["hit"]) for name in [*tasks, "rightly graded"]))
    chance = [tables.percent(some[name]["hit_by_chance"]) for name in [*tasks, "rightly graded"]]
    table.add_row("chance", *chance)
    table.add_row("rightly graded", *(tables.percent(some[name]["right"]) for name in tasks), "")
    console.print(table)
    table = Table(f"{NUM_VIEWS} {FULL}", *MEASURES.values(), "even map")
    for name, figures in found.get(f"{NUM_VIEWS} {FULL}", {}).items():
        table.add_row(name, *(tables.percent(figures[each]) for each in (*MEASURES, "lesion_share")))
    console.print(table)


if __name__ == "__main__":
    start("pointing", Arguments, main)
