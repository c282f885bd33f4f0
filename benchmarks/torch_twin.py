"""The same network in PyTorch with the same weights, for comparisons.

It is written as a PyTorch user would write it, from PyTorch's layers. It reads the layer table of
`spinejax/network/spinenet.py`, so that a change there changes it too. Needs the extra `bench`.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import numpy as np

from benchmarks.running import peer
from spinejax.config import Config
from spinejax.geometry import MARGINS, WINDOW_SHAPE
from spinejax.inference.predict import IN_PLANE_VIEWS
from spinejax.network import views
from spinejax.network.spinenet import LAYERS, Conv, Dense, SpineNet

torch = peer("torch")


class Twin(torch.nn.Module):
    """`SpineNet` on windows float32[N, 9, 112, 224]: in PyTorch the slices, its channels, come first.

    Args:
        model: the network.
        variables: its weights, which are copied.
    """

    def __init__(self, model: SpineNet, variables: Mapping):
        super().__init__()
        num_shared = [None, *(layer.name for layer in LAYERS)].index(model.branch_point)
        slice_mean = torch.tensor(np.asarray(variables["constants"]["slice_mean"]))
        self.register_buffer("slice_mean", slice_mean[:, None, None])
        shape = (model.num_slices, *WINDOW_SHAPE[:2])
        params = variables["params"]
        self.trunk, shape = _stack(LAYERS[:num_shared], params.get("trunk", {}), shape, model.dropout)
        self.heads = torch.nn.ModuleDict()
        for task in model.tasks:
            of_head = params[f"head_{task.name}"]
            head, ends = _stack(LAYERS[num_shared:], of_head, shape, model.dropout)
            head.add_module("flat8", torch.nn.Flatten())
            head.add_module("fc8", _linear(of_head["fc8"], ends))
            self.heads[task.name] = head

    def forward(self, windows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Task name → float32[N, C], the unnormalised scores."""
        features = self.trunk(windows - self.slice_mean)
        return {name: head(features) for name, head in self.heads.items()}


def windows_of(windows) -> torch.Tensor:
    """float32[N, 9, 112, 224] from spinejax's float32[N, 112, 224, 9]; in memory the slices stay last."""
    slices_first = np.ascontiguousarray(np.moveaxis(np.asarray(windows), -1, 1))
    return torch.tensor(slices_first).contiguous(memory_format=torch.channels_last)


def volumes_of(volumes) -> torch.Tensor:
    """float32[N, 15, 192, 320] from spinejax's uint16[N, 192, 320, 15]: PyTorch has little support for uint16."""
    return torch.tensor(np.moveaxis(np.asarray(volumes), -1, 1).astype(np.float32) / 65535)


def loss_of(scores: Mapping, targets: torch.Tensor, class_weights: Mapping) -> torch.Tensor:
    """The sum of the tasks' losses, as `losses.multi_task_loss`: of scores by task name and int64[N, T]."""
    total = torch.zeros((), device=targets.device)
    for column, (name, each) in enumerate(scores.items()):
        of_discs = torch.nn.functional.cross_entropy(each.float(), targets[:, column], reduction="none")
        total = total + (of_discs * class_weights[name][targets[:, column]]).mean()
    return total


def optimiser_of(module: torch.nn.Module, options: Config) -> torch.optim.Optimizer:
    """SGD as `train_step.make_optimiser`: weights decay, biases do not."""
    named = list(module.named_parameters())
    groups = [
        {"params": [p for name, p in named if name.endswith("weight")], "weight_decay": options.weight_decay},
        {"params": [p for name, p in named if name.endswith("bias")], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, lr=options.learning_rate, momentum=options.momentum, fused=True)


def mean_of_grid(module: torch.nn.Module, volumes: torch.Tensor) -> dict[str, torch.Tensor]:
    """Task name → float32[N, C], the mean of the probabilities over the 54 views, as `predict.predict_step`."""
    grid = views.grid()
    shifts = np.column_stack([np.asarray(grid.shift_slices), np.asarray(grid.shift_px, int)]) + np.roll(MARGINS, 1)
    total: dict[str, torch.Tensor] = {}
    for turn in range(0, len(shifts), IN_PLANE_VIEWS):
        taken = []
        for number in range(turn, turn + IN_PLANE_VIEWS):
            slices, rows, columns = (
                slice(first, first + size) for first, size in zip(shifts[number], np.roll(WINDOW_SHAPE, 1), strict=True)
            )
            window = volumes[:, slices, rows, columns]
            taken.append(window.flip(1) if grid.flip[number] else window)
        scores = module(torch.cat(taken).contiguous(memory_format=torch.channels_last))
        for name, each in scores.items():
            summed = each.float().softmax(1).unflatten(0, (len(taken), -1)).sum(0)
            total[name] = total[name] + summed if name in total else summed
    return {name: each / len(shifts) for name, each in total.items()}


def input_gradients(module: torch.nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """float32[N, T, 9, 112, 224]: each task's first score traced back, as `hotspots.input_gradients`."""
    leaf = windows.detach().requires_grad_()
    scores = list(module(leaf).values())
    each = [
        torch.autograd.grad(task[:, 0].sum(), leaf, retain_graph=number < len(scores) - 1)[0]
        for number, task in enumerate(scores)
    ]
    return torch.stack(each, dim=1)


def _stack(layers: Sequence[Conv | Dense], params: Mapping, shape: tuple[int, ...], dropout: float):
    """The layers as one module, and the shape of their output: (C, H, W), or (C,) after a dense layer."""
    modules: OrderedDict[str, torch.nn.Module] = OrderedDict()
    for layer in layers:
        weights = params[layer.name]
        if isinstance(layer, Conv):
            kernel = np.asarray(weights["kernel"]).transpose(3, 2, 0, 1)
            convolve = torch.nn.Conv2d(shape[0], len(kernel), layer.kernel, layer.stride, layer.padding)
            modules[layer.name] = _filled(convolve, kernel, weights["bias"])
            modules[f"relu_{layer.name}"] = torch.nn.ReLU()
            sides = [(side + 2 * layer.padding - layer.kernel) // layer.stride + 1 for side in shape[1:]]
            if layer.pool:
                modules[f"pool_{layer.name}"] = torch.nn.MaxPool2d(2)
                sides = [side // 2 for side in sides]
            shape = (len(kernel), *sides)
        else:
            modules[f"flat_{layer.name}"] = torch.nn.Flatten()
            modules[layer.name] = _linear(weights, shape)
            modules[f"relu_{layer.name}"] = torch.nn.ReLU()
            modules[f"dropout_{layer.name}"] = torch.nn.Dropout(dropout)
            shape = (modules[layer.name].out_features,)
    return torch.nn.Sequential(modules), shape


def _linear(weights: Mapping, shape: tuple[int, ...]) -> torch.nn.Linear:
    """A linear layer on flattened (C, H, W); spinejax flattens (H, W, C)."""
    kernel = np.asarray(weights["kernel"])
    if len(shape) == 3:
        channels, height, width = shape
        kernel = kernel.reshape(height, width, channels, -1).transpose(2, 0, 1, 3).reshape(kernel.shape)
    return _filled(torch.nn.Linear(*kernel.shape), kernel.T, weights["bias"])


def _filled(module, kernel: np.ndarray, bias):
    with torch.no_grad():
        module.weight.copy_(torch.tensor(np.ascontiguousarray(kernel)))
        module.bias.copy_(torch.tensor(np.asarray(bias)))
    return module
