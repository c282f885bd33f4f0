"""The calls that `benchmarks/accelerator.py` times in PyTorch, on the device that it finds: in bfloat16, channels last.

Training keeps float32 weights, as spinejax does, and computes under autocast. Grading and hotspots convert the weights
once, which is more than spinejax does.
"""

from collections.abc import Callable, Mapping

import numpy as np

from benchmarks.running import peer
from benchmarks.torch_twin import Twin, input_gradients, loss_of, mean_of_grid, optimiser_of, volumes_of, windows_of
from spinejax.config import Config
from spinejax.network.spinenet import SpineNet

torch = peer("torch")
peer("torch._functorch.config").donated_buffer = False  # otherwise a compiled graph could not be kept for the next task
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WAYS: dict[str, Callable] = {"eager": lambda module: module, "compiled": torch.compile}


def on_device(backend: str) -> bool:
    """Whether PyTorch computes on the same kind of device as a backend of JAX."""
    return {"gpu": "cuda"}.get(backend, backend) == DEVICE


def wait(_) -> None:
    """Until the device has computed what was called."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def twin(model: SpineNet, variables: Mapping) -> Twin:
    """The same network on the device."""
    return Twin(model, variables).to(DEVICE, memory_format=torch.channels_last)


def train(module: Twin, prepare: Callable, windows, labels, config: Config) -> Callable[[], None]:
    """A step of SGD on windows; every grade counts alike."""
    theirs, targets = windows_of(windows).to(DEVICE), torch.tensor(np.asarray(labels)).long().to(DEVICE)
    with torch.no_grad():
        weights = {name: torch.ones(scores.shape[1], device=DEVICE) for name, scores in module(theirs[:1]).items()}
    optimiser, prepared = optimiser_of(module.train(), config), prepare(module)

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            scores = prepared(theirs)
        loss_of(scores, targets, weights).backward()
        optimiser.step()

    return step


def grade(module: Twin, prepare: Callable, volumes) -> Callable[[], None]:
    """The mean over 54 views."""
    theirs, prepared = volumes_of(volumes).to(DEVICE, torch.bfloat16), prepare(module.eval().bfloat16())

    def average() -> None:
        with torch.no_grad():
            mean_of_grid(prepared, theirs)

    return average


def explain(module: Twin, prepare: Callable, windows) -> Callable[[], None]:
    """The gradients of every task's score with respect to windows."""
    module = module.eval().bfloat16().requires_grad_(False)
    theirs, prepared = windows_of(windows).to(DEVICE, torch.bfloat16), prepare(module)
    return lambda: input_gradients(prepared, theirs)
