"""The variants of the recipe that `benchmarks.recipe` judges: what each changes of the base.

A variant has other options, other discs, or other functions in place of the library's: losses, and what is done to
windows. What needs trainings of its own, `benchmarks.recipe` does.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from spinejax.config import PRESETS
from spinejax.data.dataset import DataSet
from spinejax.network import losses
from spinejax.network.spinenet import filled
from spinejax.tasks import UNLABELLED, Task
from spinejax.training import train_step

POOLED = dataclasses.replace(PRESETS["pooled"][1], balance="all")
"""The base: the preset `pooled`, but for class weights within sources, which were chosen after these variants."""
BASE, OTHER_SEED, SPIDER_ALONE = "base", "another seed", "SPIDER alone"
SPIDER_TASKS = (
    *("pfirrmann", "narrowing", "upper_endplate", "lower_endplate", "modic"),
    *("bulging", "herniation", "spondylolisthesis"),
)
"""The tasks that SPIDER's gradings label."""
TEACHERS = (BASE, OTHER_SEED, "ordinal loss", "ordinal loss, another seed", "blur")
"""Networks of ten tasks that the judges had found no worse than the base, before anything was distilled from them."""

Patches = Sequence[tuple[Any, str, Callable]]
"""Functions in place of others: module, name, function."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """A change of the recipe.

    Args:
        options: of `train.py`, that differ from the base's.
        discs: makes the training discs out of the base's.
        patches: in place of functions of the library while the network is trained.
        turned_first: the trunk first learns, from the phantoms' weights on, how discs without grades are turned.
        uncontradicted: labels that networks of other patients contradict do not teach.
        teachers: variants, trained before, whose networks' mean probabilities teach beside the labels.
        judged: makes the discs that judge out of the base's.
    """

    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    discs: Callable[[DataSet, Path], DataSet] = lambda data, weights: data
    patches: Patches = ()
    turned_first: bool = False
    uncontradicted: bool = False
    teachers: Sequence[str] = ()
    judged: Callable[[DataSet], DataSet] | None = None


# Discs ----------------------------------------------------------------------------------------------------------------


def _contrasts(data: DataSet) -> np.ndarray:
    return np.array([data.manifest["scans"][scan]["contrast"] for scan in data.scan.tolist()])


def spider_alone(data: DataSet, weights: Path) -> DataSet:
    """No patient of Sudirman's teaches or chooses the epoch."""
    source = np.array([data.manifest["scans"][scan]["source"] for scan in data.scan.tolist()])
    data.split = np.where((source != "spider") & (data.split != "test"), "unused", data.split)
    return data


def t2_alone(data: DataSet, weights: Path) -> DataSet:
    """No T1 slice teaches or chooses the epoch."""
    data.split = np.where((_contrasts(data) == "t1") & (data.split != "test"), "unused", data.split)
    return data


def t1_without_pfirrmann(data: DataSet, weights: Path) -> DataSet:
    """T1 slices teach the other tasks: a disc's signal, of which the grade is made, is a matter of T2."""
    column = [task.name for task in data.tasks].index("pfirrmann")
    data.labels = data.labels.copy()
    data.labels[_contrasts(data) == "t1", column] = UNLABELLED
    return data


def by_source_and_contrast(data: DataSet, weights: Path) -> DataSet:
    """T1 and T2 discs of one source count as of two."""
    described = data.manifest["scans"]
    names = [f"{described[scan]['source']} {described[scan]['contrast']}" for scan in data.scan.tolist()]
    data.source = np.unique(names, return_inverse=True)[1].astype(np.int32)
    return data


class Paired(DataSet):
    """Discs of one T2 slice beside which is, as the next slice, the T1 slice of the same disc, where there is one."""

    _stored: np.ndarray
    _partner: np.ndarray

    @classmethod
    def added(cls, data: DataSet, weights: Path) -> "Paired":
        """All discs as they are, then the pairs as further training discs, so that T1 may be missing."""
        both, t2, t1 = cls._and_pairs(data)
        teach = data.split[t2] == "train"
        t2, t1 = t2[teach], t1[teach]
        both._stored = np.append(np.arange(len(data)), t2)
        both._partner = np.append(np.full(len(data), -1), t1)
        for column in ("labels", "split", "source"):
            setattr(both, column, np.concatenate([getattr(data, column), getattr(data, column)[t2]]))
        both.slices = np.concatenate([data.slices, data.slices[t2] + [0, 1]])
        return both

    @classmethod
    def instead(cls, data: DataSet) -> "Paired":
        """The pairs in place of their T2 discs."""
        pairs, t2, t1 = cls._and_pairs(data)
        pairs._stored, pairs._partner = np.arange(len(data)), np.full(len(data), -1)
        pairs._partner[t2] = t1
        pairs.slices = data.slices.copy()
        pairs.slices[t2, 1] += 1
        return pairs

    @classmethod
    def _and_pairs(cls, data: DataSet) -> tuple["Paired", np.ndarray, np.ndarray]:
        """The data set, the rows of its T2 discs of one slice that have a T1 partner, and those of the partners."""
        t1 = _contrasts(data) == "t1"
        keys = [*zip(data.patient.tolist(), data.level.tolist(), strict=True)]
        partner_of = {keys[row]: row for row in np.flatnonzero(t1)}
        alone = ~t1 & (data.slices[:, 1] - data.slices[:, 0] == 1)
        t2 = np.array([row for row in np.flatnonzero(alone) if keys[row] in partner_of], int)
        return cls(data.folder), t2, np.array([partner_of[keys[row]] for row in t2], int)

    def _read_volume(self, row: int, into: np.ndarray) -> np.ndarray:
        super()._read_volume(int(self._stored[row]), into)
        if self._partner[row] >= 0:
            partner = super()._read_volume(int(self._partner[row]), np.empty_like(into))
            into[..., self.slices[row, 1] - 1] = partner[..., self.slices[self._partner[row], 0]]
        return into


class Turned(DataSet):
    """Discs without grades, some of them turned: the task is to tell how. Patients who judge are left out."""

    task = Task("turned", ("upright", "upside down", "back to front", "by 180°"))

    @classmethod
    def of(cls, data: DataSet) -> "Turned":
        """The discs of a data set that train or choose, each turned in a way of its own."""
        turned = cls(data.folder)
        turned.tasks = (cls.task,)
        turned.split = data.split
        turns = np.random.default_rng(0).integers(0, cls.task.num_grades, (len(data), 1))
        turned.labels = turns.astype(data.labels.dtype)
        return turned

    def volumes(self, rows, *, threads: int = 1) -> np.ndarray:
        """As `DataSet.volumes`, turned."""
        volumes = super().volumes(rows, threads=threads)
        for volume, (turn,) in zip(volumes, self.labels[rows], strict=True):
            volume[:] = volume[:: -1 if turn & 1 else 1, :: -1 if turn & 2 else 1].copy()
        return volumes


class WithPhantoms(DataSet):
    """Real discs, and the training discs of phantoms with the labels that mean the same in both."""

    shared = ("pfirrmann", "upper_endplate", "lower_endplate")
    endplates = ("upper_endplate", "lower_endplate")

    @classmethod
    def added(cls, data: DataSet, weights: Path, *, tasks: Sequence[str] = shared) -> "WithPhantoms":
        """The real discs first, then the phantoms' as further training discs, which teach some tasks."""
        both = cls(data.folder)
        both._drawn = DataSet(weights / "phantoms")
        both._num_real, both._drawn_rows = len(data), both._drawn.rows("train")
        names, drawn_names = ([task.name for task in each.tasks] for each in (data, both._drawn))
        labels = np.full((len(both._drawn_rows), len(names)), UNLABELLED)
        for name in tasks:
            labels[:, names.index(name)] = both._drawn.labels[both._drawn_rows, drawn_names.index(name)]
        both.labels = np.concatenate([data.labels, labels])
        both.slices = np.concatenate([data.slices, both._drawn.slices[both._drawn_rows]])
        both.split = np.concatenate([data.split, np.repeat("train", len(labels))])
        both.source = np.append(data.source, np.full(len(labels), data.source.max() + 1, np.int32))
        return both

    def volumes(self, rows, *, threads: int = 1) -> np.ndarray:
        """As `DataSet.volumes`, of either kind."""
        real = rows < self._num_real
        volumes = super().volumes(np.where(real, rows, 0), threads=threads)
        volumes[~real] = self._drawn.volumes(self._drawn_rows[rows[~real] - self._num_real])
        return volumes


with_endplates = functools.partial(WithPhantoms.added, tasks=WithPhantoms.endplates)


def contradicted(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Which labels a network contradicts: it is confident of another grade (confident learning, Northcutt et al. 2021).

    It is confident of a grade if that is at least as probable as on average over the discs with this label; of several,
    of the most probable one. Where there are three grades or more, a neighbour of the label does not contradict it: the
    soft labels allow for that already.

    Args:
        labels: int[N].
        probabilities: float[N, C], of a network that has not seen the labels.

    Returns:
        bool[N].
    """
    num_grades = probabilities.shape[1]
    thresholds = np.ones(num_grades)
    for grade in np.unique(labels):
        thresholds[grade] = probabilities[labels == grade, grade].mean()
    confident = np.where(probabilities >= thresholds, probabilities, 0)
    distance = np.abs(confident.argmax(1) - labels)
    return confident.any(1) & (distance >= min(2, num_grades - 1))


# Losses ---------------------------------------------------------------------------------------------------------------


def squared_distance(
    logits, labels, class_weights, softness: float = 0.0, num_labelled=None, sources=None
) -> jax.Array:
    """An ordinal loss: the squared difference of the cumulated probabilities of grades and of the label."""
    labelled = labels != UNLABELLED
    grade = jnp.where(labelled, labels, 0)
    target = jax.nn.one_hot(grade, logits.shape[1])
    distance = jnp.sum(jnp.square(jnp.cumsum(jax.nn.softmax(logits) - target, axis=1)), axis=1)
    # Twelve times the distance pulls about as hard as the log-loss does, which the other tasks keep.
    each = 12 * distance / (logits.shape[1] - 1) * jnp.asarray(class_weights)[grade]
    return jnp.sum(each, where=labelled) / _divisor(labels, num_labelled)


def _ordinal(logits, *options) -> jax.Array:
    loss = squared_distance if logits.shape[1] > 2 else _task_loss
    return loss(logits, *options)


def bounded_loss(logits, labels, class_weights, softness: float = 0.0, num_labelled=None, sources=None) -> jax.Array:
    """A loss that forgives what looks mislabelled: generalised cross entropy (Zhang and Sabuncu 2018, eq. 6).

    With an exponent of a half it is at most 2, however sure the network is that a label is wrong.
    """
    labelled = labels != UNLABELLED
    grade = jnp.where(labelled, labels, 0)
    of_label = jnp.take_along_axis(jax.nn.log_softmax(logits), grade[:, None], axis=1)[:, 0]
    each = 2 * (1 - jnp.exp(of_label / 2)) * jnp.asarray(class_weights)[grade]
    return jnp.sum(each, where=labelled) / _divisor(labels, num_labelled)


def tempered_weights(labels, tasks: Sequence[Task], sources) -> dict[str, np.ndarray]:
    """Square roots of each source's class weights, float32[S, C], that average one over its labelled discs.

    A grade that a source gives to one disc in sixty then counts an eighth of one that nearly all others have.
    """
    tempered = {name: np.sqrt(each) for name, each in _class_weights(labels, tasks, sources).items()}
    for task, column in zip(tasks, np.asarray(labels).T, strict=True):
        for source, roots in enumerate(tempered[task.name]):
            known = column[(sources == source) & (column != UNLABELLED)]
            if len(known):
                roots /= roots[known].mean()
    return tempered


def log_frequencies(labels, tasks: Sequence[Task], sources) -> dict[str, np.ndarray]:
    """In place of class weights: the logarithm of how often each source gives each grade, float32[S, C].

    Each grade counts once more than it occurs, so that one that a source never gives has a finite one.
    """
    counts = {
        task.name: np.stack(
            [
                np.bincount(column[(sources == each) & (column != UNLABELLED)], minlength=task.num_grades)
                for each in range(sources.max() + 1)
            ]
        )
        for task, column in zip(tasks, np.asarray(labels).T, strict=True)
    }
    return {name: np.log((n + 1) / (n + 1).sum(1, keepdims=True)).astype(np.float32) for name, n in counts.items()}


def biased_loss(logits, labels, frequencies, softness: float = 0.0, num_labelled=None, sources=None) -> jax.Array:
    """A bias of each source at the head while it learns, in place of class weights (balanced softmax, Ren et al. 2020).

    It is the logarithm of the source's frequencies. Without it, when discs are graded, all grades are equally frequent.
    """
    same = jnp.ones(logits.shape[1])
    return _task_loss(logits + jnp.asarray(frequencies)[sources], labels, same, softness, num_labelled)


def _divisor(labels, num_labelled) -> jax.Array:
    """As `losses.task_loss` has it: a batch's labelled discs."""
    return jnp.maximum(jnp.sum(labels != UNLABELLED) if num_labelled is None else num_labelled, 1).astype(jnp.float32)


def taught(data: DataSet, means: Mapping[str, np.ndarray]) -> Patches:
    """Let training learn from labels and from probabilities, half and half; the latter for unlabelled discs too.

    So that the loss knows which disc it is about, the data set's training labels carry its row from here on:
    16 (row + 1) + label + 1.

    Args:
        data: the discs.
        means: task name → float[N, C], what teachers say about each disc.
    """
    rows = data.rows("train")
    data.labels = data.labels.astype(np.int32)
    data.labels[rows] += 1 + 16 * (rows[:, None] + 1)

    def class_weights(labels, tasks, sources=None):
        return _class_weights(labels % 16 - 1, tasks, sources)

    def loss(logits, labels, weights, task_weights, softness, num_labelled, sources=None):
        total, by_task = 0.0, {}
        for name, each in logits.items():
            label, told = labels[name] % 16 - 1, jnp.asarray(means[name])[labels[name] // 16 - 1]
            of_disc = -jnp.sum(told * jax.nn.log_softmax(each), axis=1)  # the teachers have balanced the grades already
            by_task[name] = (_task_loss(each, label, weights[name], softness, None, sources) + of_disc.mean()) / 2
            total += task_weights.get(name, 1.0) * by_task[name]
        return total, by_task

    return ((losses, "class_weights", class_weights), (losses, "multi_task_loss", loss))


# Windows, and losses that go with them --------------------------------------------------------------------------------


def _shares(num: int) -> jax.Array:
    """Mixup's share of each disc of a batch beside its partner's: quantiles of Beta(0.2, 0.2), from a half up.

    A batch is in random order, so that a share fixed by the place in it is a random share.
    """
    return jnp.asarray(stats.beta(0.2, 0.2).ppf(0.5 + (np.arange(num) + 0.5) / (2 * num)), jnp.float32)


def _mixed_windows(key, step, windows, **options) -> jax.Array:
    windows = filled(_change_looks(key, step, windows, **options))  # partners may have different slices
    share = _shares(len(windows))[:, None, None, None]
    return share * windows + (1 - share) * windows[::-1]


def _mixed_loss(logits, labels, class_weights, softness: float = 0.0, num_labelled=None, sources=None) -> jax.Array:
    """The loss of each disc's label and of its partner's, by their shares."""
    share = _shares(len(labels))

    def weighted(labels, share):
        each = jax.vmap(lambda *one: _task_loss(*(part[None] for part in one), jnp.asarray(class_weights), softness))
        return jnp.sum(share * each(logits, labels))

    return (weighted(labels, share) + weighted(labels[::-1], 1 - share)) / _divisor(labels, num_labelled)


def _worse_windows(key, step, windows, **options) -> jax.Array:
    """What scanners and exports do to a scan, at random: a bias field, thicker slices, fewer grey levels.

    Intensities are clipped to [0, 1] as well, as an export does.
    """
    windows = filled(_change_looks(key, step, windows, **options))
    keys = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, step), 2), len(windows))
    return _worse(keys, windows)


@jax.jit
@jax.vmap
def _worse(key, window) -> jax.Array:
    bias_key, profile_key, levels_key = jax.random.split(key, 3)
    # A coil's field: the exponential of a polynomial of degree 2, up to a factor of about 1.5 towards an edge, and of 2
    # in a corner.
    row = jnp.linspace(-1, 1, window.shape[0])[:, None, None]
    column = jnp.linspace(-1, 1, window.shape[1])[None, :, None]
    terms = (row, column, row * column, row**2, column**2)
    sizes = jax.random.uniform(bias_key, (len(terms),), minval=-0.2, maxval=0.2)
    window = window * jnp.exp(sum(size * term for size, term in zip(sizes, terms, strict=True)))
    # A slice that is excited over more than its own place: up to half of it comes from its neighbours.
    wide = jnp.concatenate([window[..., :1], window, window[..., -1:]], axis=-1)
    share = jax.random.uniform(profile_key, maxval=0.5)
    window = (1 - share) * window + share / 2 * (wide[..., :-2] + wide[..., 2:])
    # Eight bits for the whole scan leave a disc between 32 and 256 of them.
    levels = jnp.floor(2 ** jax.random.uniform(levels_key, minval=5, maxval=8))
    return jnp.round(jnp.clip(window, 0, 1) * levels) / levels


def _mirrored_windows(key, step, windows, **options) -> jax.Array:
    """Every other disc of a batch upside down."""
    windows = _change_looks(key, step, windows, **options)
    return windows.at[::2].set(windows[::2, ::-1])


def _mirrored_loss(logits, labels, *options) -> tuple:
    """What is upper in a disc that is upside down is lower."""
    upper, lower = labels["upper_endplate"], labels["lower_endplate"]
    swapped = {"upper_endplate": upper.at[::2].set(lower[::2]), "lower_endplate": lower.at[::2].set(upper[::2])}
    return _multi_task_loss(logits, labels | swapped, *options)


_task_loss, _multi_task_loss, _change_looks = losses.task_loss, losses.multi_task_loss, train_step.change_looks
_class_weights = losses.class_weights
ORDINAL = ((losses, "task_loss", _ordinal),)
TEMPERED = ((losses, "class_weights", tempered_weights),)
BIASED = ((losses, "class_weights", log_frequencies), (losses, "task_loss", biased_loss))
MIRRORED = ((train_step, "change_looks", _mirrored_windows), (losses, "multi_task_loss", _mirrored_loss))


# The table ------------------------------------------------------------------------------------------------------------

VARIANTS = {
    BASE: Variant(),
    OTHER_SEED: Variant({"seed": 1}),
    "T1 without Pfirrmann": Variant(discs=t1_without_pfirrmann),
    SPIDER_ALONE: Variant({"tasks": SPIDER_TASKS}, discs=spider_alone),
    "hard labels": Variant({"soft_labels": 0.0}),
    "mixup": Variant(patches=((train_step, "change_looks", _mixed_windows), (losses, "task_loss", _mixed_loss))),
    "ordinal loss": Variant(patches=ORDINAL),
    "ordinal loss, another seed": Variant({"seed": 1}, patches=ORDINAL),
    "bounded loss": Variant(patches=((losses, "task_loss", bounded_loss),)),
    "turned first": Variant(turned_first=True),
    "phantoms along": Variant(discs=WithPhantoms.added),
    "phantoms for endplates": Variant(discs=with_endplates),
    "phantoms for endplates, mirrored": Variant(discs=with_endplates, patches=MIRRORED),
    "mirrored": Variant(patches=MIRRORED),
    "phantoms along, mirrored": Variant(discs=WithPhantoms.added, patches=MIRRORED),
    "T2 alone": Variant(discs=t2_alone),
    "five tasks": Variant({"tasks": ("pfirrmann", "narrowing", "upper_endplate", "lower_endplate", "modic")}),
    "no contrast": Variant({"contrast": 0.0}),
    "greys unchanged": Variant({"contrast": 0.0, "views": dataclasses.replace(POOLED.views, intensity=0.0)}),
    "no average": Variant({"average_weights": 0.0}),
    "blur": Variant({"blur": 0.5}),
    "from nothing": Variant({"init_from": None}),
    "worse scans": Variant(patches=((train_step, "change_looks", _worse_windows),)),
    "class weights within sources": Variant({"balance": "source"}),
    "class weights within sources, another seed": Variant({"balance": "source", "seed": 1}),
    "tempered class weights within sources": Variant({"balance": "source"}, patches=TEMPERED),
    "tempered class weights within sources, another seed": Variant({"balance": "source", "seed": 1}, patches=TEMPERED),
    "bias of each source": Variant({"balance": "source"}, patches=BIASED),
    "bias of each source and contrast": Variant({"balance": "source"}, by_source_and_contrast, BIASED),
    "T1 beside T2": Variant(discs=Paired.added, judged=Paired.instead),
    "contradicted labels left out": Variant(uncontradicted=True),
    "distilled from five": Variant(teachers=TEACHERS),
    "branch at fc6": Variant({"branch_point": "fc6"}),
    "branch at conv4": Variant({"branch_point": "conv4"}),
    "three times as long": Variant({"epochs": 120, "plateau_patience": 15}),
    "twice as wide": Variant({"width": 0.25, "init_from": None}),
    "twice as wide, another seed": Variant({"width": 0.25, "init_from": None, "seed": 1}),
}
