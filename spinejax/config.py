"""Every choice of a training run: frozen dataclasses, the presets, and their JSON."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import pydantic

from spinejax.errors import SpinejaxError, require_option
from spinejax.files.atomic import write_atomically
from spinejax.network.views import ViewRanges

MOST_WIDTH = 64
"""Times the paper's features. It is beyond any machine, and short of what XLA ends the process at."""


_KNOWN_OPTIONS_ONLY = pydantic.ConfigDict(extra="forbid")


@dataclass(frozen=True)
class Config:
    """The options of `train.py`. The defaults are the paper's (Sect. 4), literally, where it names a value."""

    tasks: tuple[str, ...] = ()
    """Tasks to learn, by name; all of the data set's if none is named. One task alone: the paper's single-task net."""
    branch_point: Literal["none", "conv3", "conv4", "conv5", "fc6", "fc7"] = "conv5"
    """The last layer that the tasks share; "none" is one network a task."""
    width: float = 1.0
    """Multiplies the features of every layer."""
    dropout: float = 0.5
    """Fraction dropped after fc6 and fc7."""
    initialiser: Literal["glorot", "he"] = "glorot"
    """How weights start: glorot is the paper's; he keeps the signal's scale through ReLUs, and so starts faster."""
    fill_slices: bool = False
    """Repeat the nearest slice where a scan has none, which the paper leaves black: for scans of one or few slices."""
    init_from: Path | None = None
    """A run, or its `export` folder: a new run starts with those of its weights that have a name and shape of this
    network's, and draws the others."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the computation; parameters, loss and optimiser stay float32."""

    layout: Literal["auto", "data", "split"] = "auto"
    """What each device keeps: "data" all parameters, "split" a share of fc6 and fc7; "auto": of which less travels."""
    cache: Literal["none", "device"] = "none"
    """"device" reads the discs once and keeps them in the devices' memory, split over them."""

    batch_size: int = 256
    """Discs a step, over all devices."""
    epochs: int = 1000
    """Passes over the training discs, in whole batches, at the most."""
    learning_rate: float = 1e-3
    """At the start."""
    momentum: float = 0.9
    """Of stochastic gradient descent."""
    weight_decay: float = 5e-4
    """L2 penalty on weights, not on biases."""
    plateau_patience: int = 10
    """Evaluations in a row without a lower validation error after which the learning rate is lowered."""
    plateau_factor: float = 0.1
    """What the learning rate is then multiplied by."""
    num_decays: int = 2
    """Times that the learning rate is lowered; training ends at the next plateau."""
    task_weights: tuple[tuple[str, float], ...] = ()
    """Weight of a task's loss (the paper's ω), as `NAME VALUE` pairs; 1 for a task that is not named."""
    max_skipped: int = 5
    """Steps in a row with a NaN or infinite gradient, which change no weight, after which training stops."""
    views: ViewRanges = field(default_factory=ViewRanges)
    """What each disc's random view is drawn from."""

    seed: int = 0
    """Decides the initial weights, the order of the discs, their views and dropout."""
    validation_split: Literal["validation", "test"] = "validation"
    """The split that decides the learning rate and the best step. The paper swaps validation and test for a second
    network, to tell how far results spread."""
    eval_epochs: int = 1
    """Evaluate on that split, and save a checkpoint, every so many epochs."""
    workers: int = 0
    """Processes that read ahead; 0 reads in threads of this one."""
    tensorboard: bool = False
    """Also write scalars for TensorBoard into the run folder (extra `tensorboard`)."""

    __pydantic_config__ = _KNOWN_OPTIONS_ONLY

    def __post_init__(self):
        for name in ("batch_size", "epochs", "eval_epochs", "plateau_patience", "max_skipped"):
            require_option(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        require_option(0 < self.width <= MOST_WIDTH, "width", self.width, f"above 0, at most {MOST_WIDTH}")
        require_option(0 < self.learning_rate < float("inf"), "learning_rate", self.learning_rate, "above 0")
        for name in ("dropout", "momentum"):
            require_option(0 <= getattr(self, name) < 1, name, getattr(self, name), "0 to below 1")
        require_option(0 < self.plateau_factor < 1, "plateau_factor", self.plateau_factor, "between 0 and 1")
        for name in ("weight_decay", "num_decays", "workers"):
            require_option(0 <= getattr(self, name) < float("inf"), name, getattr(self, name), "0 or more")
        require_option(0 <= self.seed < 2**32, "seed", self.seed, "0 to 4294967295")
        for name, weight in self.task_weights:
            require_option(0 <= weight < float("inf"), "task_weights", f"{name} {weight}", "weights of 0 or more")

    def model_branch_point(self) -> str | None:
        """The branch point as `SpineNet` has it."""
        return None if self.branch_point == "none" else self.branch_point


_NARROW = Config(
    width=0.125,
    initialiser="he",
    batch_size=32,
    learning_rate=0.01,
    eval_epochs=2,
    # Milder than the paper's, whose widest shifts take more training to learn; milder still, and a network learns a
    # thousand discs by heart.
    views=ViewRanges(angle_deg=10, shift_rows_px=16, shift_columns_px=20, shift_slices=1),
)

PRESETS = {
    "paper": ("The paper's network and training (Sect. 4), literally: full width, about 1000 epochs.", Config()),
    "quickstart": (
        "A narrow network that learns the phantoms of `make quickstart` in minutes on two cores.",
        # Marrow is learned last, and the error wavers: a rate that falls before leaves a task behind for good.
        replace(_NARROW, epochs=150, plateau_patience=15),
    ),
    "spider": (
        "SPIDER's gradings (docs/results.md), starting from phantoms with --init-from; ten minutes on two cores.",
        replace(
            _NARROW,
            tasks=("pfirrmann", "narrowing", "upper_endplate", "lower_endplate", "modic"),
            fill_slices=True,
            epochs=120,
            plateau_patience=10,
            num_decays=1,
        ),
    ),
}
"""Name → (what it is for, the options)."""

CHANGEABLE_ON_RESUME = ("epochs", "max_skipped", "workers", "tensorboard", "layout", "cache")
"""Options that may differ when a run goes on: none of them changes what a step computes (another layout, like another
number of devices, takes sums in another order)."""


def of_a_step(config: Config) -> Config:
    """The options with everything at its default that no step depends on, so that changing it compiles nothing anew."""
    of_the_loop = (
        "seed",
        "init_from",
        "validation_split",
        "eval_epochs",
        "plateau_patience",
        "plateau_factor",
        "num_decays",
    )
    return replace(config, **{name: getattr(Config(), name) for name in (*CHANGEABLE_ON_RESUME, *of_the_loop)})


def save(config: Config, path: Path) -> None:
    """Write a run's options as JSON."""
    text = pydantic.TypeAdapter(Config).dump_json(config, indent=1) + b"\n"
    write_atomically(path, lambda temporary: temporary.write_bytes(text))


def load(path: Path) -> Config:
    """Read a run's options.

    Raises:
        SpinejaxError: the file is missing or an option in it is unknown, of the wrong type or out of range.
    """
    if not path.is_file():
        raise SpinejaxError(f"{path}: missing, so its folder is not a run. `python train.py` makes one.")
    try:
        return pydantic.TypeAdapter(Config).validate_json(path.read_bytes())
    except SpinejaxError as error:
        raise SpinejaxError(f"{path}: {error}") from error
    except pydantic.ValidationError as error:
        fault = error.errors()[0]
        option = ".".join(map(str, fault["loc"])) or "the file"
        raise SpinejaxError(f"{path}: {option}: {fault['msg']}.") from error
