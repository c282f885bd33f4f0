"""How often discs unlike those that a network learned from are told, and how often others are mistaken for such discs.

`python -m benchmarks.unusual --run DIR` takes the finished folds of `benchmarks.weights --out DIR`. For each fold it
fits what is usual to the fold's training and validation discs, and measures test discs, as they are and with faults
made up. It writes `unusual.md` and `unusual.json`: the share told with its interval (Clopper and Pearson, which takes
discs for independent), and for four scores the area under the ROC curve against the same discs without a fault.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt16
from rich.console import Console
from scipy import ndimage
from scipy.stats import binomtest

import spinejax
from benchmarks import tables
from benchmarks.running import peer, start
from spinejax.data.dataset import DataSet
from spinejax.errors import SpinejaxError
from spinejax.files.atomic import write_atomically
from spinejax.files.json_files import write_json
from spinejax.geometry import INTENSITY_ONE, VOLUME_SHAPE
from spinejax.inference import predict, unusual
from spinejax.metrics.usual import Usual
from spinejax.network import views
from spinejax.network.cpu_kernels import with_cpu_kernels
from spinejax.network.spinenet import SpineNet
from spinejax.parallel import runtime

BATCH = 16
DISC_PX = 25
"""A disc's height, which is typical: its width is 112 px."""
UNSEEN = "unseen"
T1_FOR_T2, T2_FOR_T2 = (f"unseen {contrast} discs, if only T2 discs are usual" for contrast in ("T1", "T2"))
NUM_FOR_TRUNK = 500
"""Training discs whose trunk's output is compared with."""

Slices = Float[np.ndarray, "192 320 S"]


@dataclass(frozen=True)
class Arguments:
    """Measure how often unusual discs are told."""

    run: Path
    """Folder of `benchmarks.weights --out`, or another with `fold-K/run` and `fold-K/discs`."""
    out: Path = Path("runs/unusual")
    """Folder of the table."""
    discs: int = 100
    """Test discs of each fold, drawn at random."""
    seed: int = 0
    """Seed of the draw and of the noise."""


def main(arguments: Arguments) -> None:
    """Measure all finished folds, and write the table."""
    runtime.set_up()
    folds = [folder for folder in sorted(arguments.run.glob("fold-*")) if (folder / "run" / "export").is_dir()]
    if not folds:
        raise SpinejaxError(f"{arguments.run}: no fold whose training has ended (fold-K/run/export).")
    measured: dict[str, list[Scores]] = {}
    for folder in folds:
        for kind, scores in of_fold(folder, arguments.discs, arguments.seed).items():
            measured.setdefault(kind, []).append(scores)
    pooled = {kind: Scores(*map(np.concatenate, zip(*parts, strict=True))) for kind, parts in measured.items()}
    rows = table(pooled)
    text = markdown(rows)
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out / "unusual.json", {"folds": [folder.name for folder in folds], "kinds": rows})
    write_atomically(arguments.out / "unusual.md", lambda path: path.write_text(text))
    Console(width=160).print(text, markup=False, highlight=False)


# Faults: what they make of the slices inside the scan, intensities in [0, 1] ------------------------------------------


class Fault(NamedTuple):
    """A change that makes a disc unusual, and the fewest slices of a scan that it can be applied to."""

    change: Callable[[Slices, np.random.Generator], np.ndarray]
    min_slices: int = 1


def stretched(slices: Slices, rows: float, columns: float) -> np.ndarray:
    """Slices magnified about their centre, linearly; black where there is nothing."""
    centre = (np.array(slices.shape[:2]) - 1) / 2
    factors = 1 / np.array([rows, columns])
    offset = (*(centre * (1 - factors)), 0)
    return ndimage.affine_transform(slices, (*factors, 1), offset=offset, order=1)


def lowered(slices: Slices, rows: int) -> np.ndarray:
    """What a window sees that was cut so many rows too high."""
    return np.concatenate([np.zeros_like(slices[:rows]), slices[:-rows]])


def with_hole(slices: Slices) -> np.ndarray:
    """Slices with a black ellipse in the disc and the body below, of two thirds of a body's width, as beside metal."""
    row, column = np.ogrid[: VOLUME_SHAPE[0], : VOLUME_SHAPE[1]]
    inside = ((row - 118) / 22) ** 2 + ((column - 160) / 37) ** 2 < 1
    return np.where(inside[:, :, None], 0, slices)


def like_a_neck(slices: Slices) -> np.ndarray:
    """Bodies higher than wide, at half the resolution: a neck's discs are half as wide as those of a lumbar spine."""
    high = stretched(slices, 1.3, 1.0)
    return ndimage.zoom(high[::2, ::2], (2, 2, 1), order=1)


FAULTS: Mapping[str, Fault] = {
    "blur, σ 2 px (0.6 mm)": Fault(lambda slices, _: ndimage.gaussian_filter(slices, (2, 2, 0))),
    "blur, σ 4 px (1.2 mm)": Fault(lambda slices, _: ndimage.gaussian_filter(slices, (4, 4, 0))),
    "noise, σ a fifth of the bodies' median": Fault(lambda slices, rng: slices + rng.normal(0, 0.1, slices.shape)),
    "noise, σ two fifths of it": Fault(lambda slices, rng: slices + rng.normal(0, 0.2, slices.shape)),
    "three slices averaged (stacks)": Fault(lambda slices, _: ndimage.uniform_filter1d(slices, 3, axis=2), 3),
    "upside down": Fault(lambda slices, _: slices[::-1]),
    "front and back mirrored": Fault(lambda slices, _: slices[:, ::-1]),
    "cut 1.5 disc heights too high": Fault(lambda slices, _: lowered(slices, round(1.5 * DISC_PX))),
    "black hole of an implant": Fault(lambda slices, _: with_hole(slices)),
    "cut with 0.6 of the magnification": Fault(lambda slices, _: stretched(slices, 0.6, 0.6)),
    "stretched like a neck": Fault(lambda slices, _: like_a_neck(slices)),
}


def changed(
    volume: UInt16[np.ndarray, "192 320 15"], fault: Fault, rng: np.random.Generator
) -> UInt16[np.ndarray, "192 320 15"]:
    """A disc volume with a fault; what is outside the scan stays black."""
    inside = volume.any((0, 1))
    found = np.zeros_like(volume)
    made = fault.change(volume[:, :, inside].astype(np.float32) / INTENSITY_ONE, rng)
    found[:, :, inside] = np.rint(made.clip(0, 1) * INTENSITY_ONE)
    return found


# Measuring ------------------------------------------------------------------------------------------------------------


class Scores(NamedTuple):
    """Four scores of N discs; the higher, the more unusual.

    Args:
        distance: of `inference.unusual`, divided by the threshold: above 1 a disc is told.
        trunk: the same distance, of the trunk's output averaged over positions.
        confidence: one minus the given grade's probability, averaged over tasks; of nine views.
        spread: of that probability over the nine views, averaged over tasks.
    """

    distance: Float[np.ndarray, "N"]
    trunk: Float[np.ndarray, "N"]
    confidence: Float[np.ndarray, "N"]
    spread: Float[np.ndarray, "N"]


def of_fold(folder: Path, num_discs: int, seed: int) -> dict[str, Scores]:
    """The kind of disc → the scores of a fold's test discs."""
    model, variables = spinejax.load(folder / "run")
    model, data, rng = with_cpu_kernels(model), DataSet(folder / "discs"), np.random.default_rng(seed)
    usual = unusual.fit(data)
    learned = np.sort(rng.permutation(data.rows("train"))[:NUM_FOR_TRUNK])
    gaussian = peer("sklearn.covariance").LedoitWolf().fit(_in_batches(model, variables, data.volumes(learned))[0])
    trunk = Usual(gaussian.location_, gaussian.precision_, 1.0)

    def scores(volumes: np.ndarray, usual: Usual = usual) -> Scores:
        features, *doubt = _in_batches(model, variables, volumes)
        distance = usual.distance(np.stack([unusual.features_of(volume) for volume in volumes])) / usual.threshold
        return Scores(distance, trunk.distance(features), *doubt)

    test = np.sort(rng.permutation(data.rows("test"))[:num_discs])
    volumes, groups = data.volumes(test), groups_of(data)
    as_they_are = scores(volumes)
    found = {UNSEEN: as_they_are}
    for name in sorted(set(groups[test])):
        found[f"{UNSEEN}, {name}"] = Scores(*(each[groups[test] == name] for each in as_they_are))
    for name, fault in FAULTS.items():
        enough = volumes.any((1, 2)).sum(1) >= fault.min_slices
        if enough.any():
            found[name] = scores(np.stack([changed(volume, fault, rng) for volume in volumes[enough]]))

    is_t2 = np.char.endswith(groups, " t2")
    if is_t2[test].any() and not is_t2[test].all():
        of_t2 = unusual.fit(data, *(rows[is_t2[rows]] for rows in (data.rows("train"), data.rows("validation"))))
        found[T2_FOR_T2], found[T1_FOR_T2] = (scores(volumes[kept], of_t2) for kept in (is_t2[test], ~is_t2[test]))
    return found


def groups_of(data: DataSet) -> np.ndarray:
    """The source and contrast of each disc, "spider t1"; "unknown" in a data set that does not tell."""
    origin: Mapping[str, Any] = data.manifest.get("scans", {})
    known = {scan: f"{each['source']} {each['contrast']}" for scan, each in origin.items()}
    return np.array([known.get(scan, "unknown") for scan in data.scan.tolist()])


def _in_batches(model: SpineNet, variables: Mapping, volumes: np.ndarray) -> list[np.ndarray]:
    """The trunk's output, and the two scores by probabilities, of any number of discs."""
    parts = []
    for first in range(0, len(volumes), BATCH):
        batch = volumes[first : first + BATCH]
        full = np.pad(batch, ((0, BATCH - len(batch)), *[(0, 0)] * 3))  # one shape, so that one program serves all
        parts.append([np.asarray(each, np.float64)[: len(batch)] for each in _measured(variables, full, model=model)])
    return [np.concatenate(each) for each in zip(*parts, strict=True)]


@functools.partial(jax.jit, static_argnames="model")
def _measured(variables: Mapping, volumes: jax.Array, *, model: SpineNet) -> tuple[jax.Array, jax.Array, jax.Array]:
    windows = jax.vmap(views.crop, in_axes=(0, None))(volumes, views.identity())
    trunk = model.apply(variables, windows, features=True)
    middle = slice(predict.IN_PLANE_VIEWS, 2 * predict.IN_PLANE_VIEWS)  # not flipped, and no shift of slices
    nine = jax.tree.map(lambda leaf: leaf[middle], views.grid())
    probabilities, spread = predict.predict_step(variables, volumes, nine, model=model)
    doubt = jnp.stack([1 - each.max(1) for each in probabilities.values()]).mean(0)
    by_position = trunk.reshape(len(trunk), -1, trunk.shape[-1])
    return by_position.mean(1), doubt, jnp.stack(list(spread.values())).mean(0)


# The table ------------------------------------------------------------------------------------------------------------


def table(measured: Mapping[str, Scores]) -> dict[str, dict[str, Any]]:
    """The kind of disc → n, the number and share told with its 95 % interval, and the area under the curve by score."""
    found = {}
    for kind, scores in measured.items():
        told, n = int((scores.distance > 1).sum()), len(scores.distance)
        interval = binomtest(told, n).proportion_ci(0.95, method="exact")
        found[kind] = {"n": n, "told": told, "share": told / n, "low": interval.low, "high": interval.high}
        if not kind.startswith(UNSEEN) or kind == T1_FOR_T2:
            found[kind]["auc"] = areas(measured[T2_FOR_T2 if kind == T1_FOR_T2 else UNSEEN], scores)
    return found


def areas(usual: Scores, others: Scores) -> dict[str, float]:
    """The score → the area under the ROC curve that tells the others from the usual discs."""
    area = peer("sklearn.metrics").roc_auc_score
    other = np.repeat([0, 1], [len(usual.distance), len(others.distance)])
    return {
        score: float(area(other, np.concatenate([getattr(usual, score), getattr(others, score)])))
        for score in Scores._fields
    }


def markdown(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The table as text."""
    columns = ("discs", "n", "told, %", "AUC: distance", "trunk", "confidence", "spread of views")
    lines = []
    for kind, row in rows.items():
        share = f"{100 * row['share']:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"
        area = (f"{row['auc'][score]:.2f}" if "auc" in row else "–" for score in Scores._fields)
        lines.append((kind, row["n"], share, *area))
    return tables.table(columns, lines)


if __name__ == "__main__":
    start("unusual", Arguments, main)
