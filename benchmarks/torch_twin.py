"""The same network in PyTorch with the same weights, for comparisons.

It is written as a PyTorch user would write it, from PyTorch's layers. It reads the layer table of
`spinejax/network/spinenet.py`, so that a change there changes it too. Needs the extra `bench`.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import numpy as np

from benchmarks.running import peer
from spinejax.geometry import WINDOW_SHAPE
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
    """float32[N, 9, 112, 224] from spinejax's float32[N, 112, 224, 9]."""
    return torch.tensor(np.ascontiguousarray(np.moveaxis(np.asarray(windows), -1, 1)))


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
