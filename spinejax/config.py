"""The options of a training run, the presets, and their JSON."""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from spinejax.errors import SpinejaxError, require_option
from spinejax.files.json_files import read_json, write_json
from spinejax.files.stores import Address, is_address
from spinejax.network.views import ViewRanges

SHIPPED = Path("shipped")
"""What `--init-from` calls the network that ships with this package."""

MAX_WIDTH = 64
"""Factor on the paper's features. No machine has room for it; somewhat more makes XLA end the process."""


@dataclass(frozen=True)
class Config:
    """The options of `train.py`. The defaults are the paper's (Sect. 4), literally, where it names a value."""

    tasks: tuple[str, ...] = ()
    """Tasks to learn, by name; all of the data set's if none is named. One task alone: the paper's single-task net."""
    branch_point: Literal["none", "conv3", "conv4", "conv5", "fc6", "fc7"] = "conv5"
    """Last layer that the tasks share; "none" means one network per task."""
    width: float = 1.0
    """Factor by which the features of every layer are multiplied."""
    dropout: float = 0.5
    """Fraction of features dropped after fc6 and fc7."""
    initialiser: Literal["glorot", "he"] = "glorot"
    """Distribution of the initial weights: glorot is the paper's; he keeps the signal's scale through ReLUs, and so
    learns sooner."""
    fill_slices: bool = False
    """Repeat the nearest slice where a scan has none, which the paper leaves black: for scans of one or few slices."""
    init_from: str | Path | None = None
    """Run, or its `export` folder, also in a bucket, from which a new run takes initial weights: those whose name and
    shape are also in this network. The others are drawn. The word `shipped` stands for the network that ships with this
    package."""
    freeze: tuple[str, ...] = ()
    """Layers that keep the weights of `--init-from`: `trunk`, or single ones as `trunk/conv1` and `head_modic/fc6`."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the computation; parameters, loss and optimiser stay float32."""
    precision: Literal["float32", "tensorfloat32", "bfloat16"] = "float32"
    """How GPUs and TPUs multiply float32 numbers: "float32" keeps all digits; "tensorfloat32" (GPUs) and "bfloat16"
    (TPUs: one pass) are faster and keep three. CPUs keep all."""
    microbatches: int = 1
    """Parts of a batch that go through the network one after the other: the same step to rounding, in less memory."""

    layout: Literal["auto", "data", "split"] = "auto"
    """Parameters on each device: "data" keeps all, "split" a share of fc6 and fc7; "auto" picks the one that
    communicates less."""
    cache: Literal["auto", "device", "none"] = "auto"
    """Memory for the discs: "device" reads them once and keeps them in the devices' memory, divided over them; "none"
    reads them as they are needed; "auto" keeps them if they take no more than half of what is free there, and not on
    CPUs of several processes, between which discs would travel by the network."""
    read_threads: int = 0
    """Threads that read discs when they are needed; 0 takes one for each core, at most 16."""
    deterministic: bool = False
    """Use only GPU kernels that give the same bits in every run. They are slower; CPUs and TPUs need no such option."""

    batch_size: int = 256
    """Discs in a step, over all devices."""
    epochs: int = 1000
    """Most passes over the training discs, in whole batches."""
    learning_rate: float = 1e-3
    """Initial learning rate."""
    momentum: float = 0.9
    """Momentum of SGD."""
    weight_decay: float = 5e-4
    """L2 penalty on weights, not on biases."""
    plateau_patience: int = 10
    """Evaluations in a row without a lower validation error after which the learning rate is lowered."""
    plateau_factor: float = 0.1
    """Factor by which the learning rate is lowered."""
    num_decays: int = 2
    """Times that the learning rate is lowered; training ends at the next plateau."""
    task_weights: tuple[tuple[str, float], ...] = ()
    """Weights of the tasks' losses (the paper's ω), as `NAME VALUE` pairs; 1 for a task that is not named."""
    balance: Literal["all", "source"] = "all"
    """Discs over which the grades of a task are made to count alike: all that train, as in the paper, or those of each
    source that the data set names, because each has raters with habits of their own."""
    soft_labels: float = 0.0
    """Share of a disc's target that the grades next to its label have. 0 is the paper's loss."""
    average_weights: float = 0.0
    """Share that a running average of the weights keeps at each step, such as 0.999. The average is evaluated, saved
    and exported. 0 averages nothing."""
    max_skipped: int = 5
    """Steps in a row with a NaN or infinite gradient, each of them skipped, after which training stops."""
    views: ViewRanges = field(default_factory=ViewRanges)
    """Ranges from which the random view of each disc is drawn."""
    contrast: float = 0.0
    """Greatest random change of contrast in training, from 0 to 1: greys get brighter or darker by up to a quarter of
    it, black and white stay."""
    blur: float = 0.0
    """Greatest weight of a blurred copy that is mixed into a window in training, from 0 to 1."""

    seed: int = 0
    """Seed of the initial weights, the order of the discs, their views and dropout."""
    validation_split: Literal["validation", "test"] = "validation"
    """Split that decides the learning rate and the best step. The paper swaps validation and test for a second network,
    to show the spread of its results."""
    eval_epochs: int = 1
    """Epochs between two evaluations on that split."""
    save_minutes: float = 10
    """Minutes between two saves, each after an evaluation; 0 saves after every one. The first evaluation, the end, the
    best step and SIGTERM save too."""
    workers: int = 0
    """Processes that read ahead, each with its threads; 0 reads in this one."""
    tensorboard: bool = False
    """Also write scalars for TensorBoard into the run's folder (extra `tensorboard`)."""
    wandb: bool = False
    """Also log them to Weights & Biases, project spinejax (extra `wandb`); with WANDB_MODE=offline only into the run's
    folder."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    def __post_init__(self):
        if isinstance(self.init_from, str) and not is_address(self.init_from):
            object.__setattr__(self, "init_from", Path(self.init_from))
        for name in ("batch_size", "microbatches", "epochs", "eval_epochs", "plateau_patience", "max_skipped"):
            require_option(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        require_option(0 < self.width <= MAX_WIDTH, "width", self.width, f"above 0, at most {MAX_WIDTH}")
        require_option(0 < self.learning_rate < float("inf"), "learning_rate", self.learning_rate, "above 0")
        for name in ("dropout", "momentum", "soft_labels", "average_weights"):
            require_option(0 <= getattr(self, name) < 1, name, getattr(self, name), "0 to below 1")
        require_option(0 < self.plateau_factor < 1, "plateau_factor", self.plateau_factor, "between 0 and 1")
        for name in ("weight_decay", "num_decays", "workers", "read_threads", "save_minutes"):
            require_option(0 <= getattr(self, name) < float("inf"), name, getattr(self, name), "0 or more")
        for name in ("contrast", "blur"):
            require_option(0 <= getattr(self, name) <= 1, name, getattr(self, name), "0 to 1")
        require_option(0 <= self.seed < 2**32, "seed", self.seed, "0 to 4294967295")
        for name, weight in self.task_weights:
            require_option(0 <= weight < float("inf"), "task_weights", f"{name} {weight}", "weights of 0 or more")

    def model_branch_point(self) -> str | None:
        """The branch point as `SpineNet` takes it."""
        return None if self.branch_point == "none" else self.branch_point

    def evaluation_epochs(self, done: int) -> list[int]:
        """The epochs after which the network is evaluated and saved, when `done` epochs are over."""
        every = self.eval_epochs
        multiples = range(done - done % every + every, self.epochs, every)
        return [*multiples, self.epochs] if done < self.epochs else []


_NARROW = Config(
    width=0.125,
    initialiser="he",
    batch_size=32,
    learning_rate=0.01,
    eval_epochs=2,
    # Narrower than the paper's, whose widest shifts take more training. Narrower still, and a network memorises a
    # thousand discs.
    views=ViewRanges(angle_deg=10, shift_rows_px=16, shift_columns_px=20, shift_slices=1),
)

PRESETS = {
    "paper": ("The paper's network and training (Sect. 4), literally: full width, about 1000 epochs.", Config()),
    "quickstart": (
        "A narrow network that learns the phantoms of `make quickstart` in minutes on two cores.",
        # Marrow is learned last, and the error fluctuates: with a shorter patience a task may never be learned.
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
    "pooled": (
        "SPIDER and Sudirman's scans in one data set (docs/results.md), from phantoms with --init-from; 20 minutes.",
        replace(
            _NARROW,
            fill_slices=True,
            epochs=40,
            plateau_patience=5,
            num_decays=1,
            # With ten tasks, some with rare grades, a rate of 0.01 ends in a network that grades all discs alike.
            learning_rate=0.005,
            soft_labels=0.1,
            average_weights=0.999,
            contrast=0.4,
            balance="source",
        ),
    ),
    "finetune": (
        "Your own grades, from 50 discs up: starts from the network that ships, and has its layers (docs/training.md).",
        # A fifth of the other presets' rate keeps more of what the network knows. Few discs make few steps in an epoch
        # and a noisy validation error: hence many epochs, and patience.
        replace(_NARROW, init_from=SHIPPED, epochs=100, learning_rate=0.002, plateau_patience=10, num_decays=1),
    ),
}
"""Name → (what it is for, the options)."""

_PLATEAU = ("plateau_patience", "plateau_factor", "num_decays")
CHANGEABLE_ON_RESUME = (
    "epochs",
    "max_skipped",
    "save_minutes",
    "workers",
    "tensorboard",
    "wandb",
    "layout",
    "cache",
    "read_threads",
    "deterministic",
    "microbatches",
)
"""Options that may differ when a run is resumed. None of them changes what a step computes; another layout, other
microbatches, and another number of devices only sum in another order."""

_OF_THE_LOOP = ("seed", "init_from", "validation_split", "eval_epochs", *_PLATEAU)


def of_a_step(config: Config) -> Config:
    """The options that a step depends on, with all others at their defaults: changing those recompiles nothing."""
    others = {*CHANGEABLE_ON_RESUME, *_OF_THE_LOOP} - {"microbatches"}
    return replace(config, **{name: getattr(Config(), name) for name in others})


def save(config: Config, path: Path) -> None:
    """Write a run's options as JSON."""
    write_json(path, asdict(config))


def load(path: Path | Address) -> Config:
    """Read a run's options.

    Raises:
        SpinejaxError: the file is missing or an option in it is unknown, of the wrong type or out of range.
    """
    if not path.is_file():
        raise SpinejaxError(f"{path}: missing, so its folder is not a run. `python train.py` makes one.")
    return read_json(path, Config, "Restore it from a copy.")
