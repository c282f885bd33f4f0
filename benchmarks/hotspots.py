"""Speed and memory of hotspots, against PyTorch and Captum with the same weights.

    python -m benchmarks.hotspots --checkpoint runs/quickstart/run --data runs/quickstart/discs --json hotspots.json

It makes the maps of one disc, for every task, over the paper's views. The peers do what this library does: take each
view's window, compute the absolute gradient of each task's score, apply the inverse view, and average by coverage.

- captum: `captum.attr.Saliency` for each task on all views at once, with views by `grid_sample`.
- torch: one forward pass for all tasks, then one backward pass for each.

First the results must agree: scores and gradients to rounding, maps up to the difference of bilinear and two-pass
interpolation. Then all are timed in turn, several rounds in one process, and the medians are reported. CPU time is
reported too, because it varies less where other programs share the machine. Needs the extra `bench`.
"""

import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.running import peer, start


@dataclass(frozen=True)
class Arguments:
    """Compare the time of hotspots with Captum's, and measure their memory."""

    checkpoint: Path
    """Trained run."""
    data: Path
    """Data set."""
    num_views: int = 32
    """Number of views of a disc."""
    rounds: int = 5
    """Number of times that each is timed."""
    threads: int | None = None
    """Number of PyTorch's threads. Default: PyTorch's choice."""
    bounds: tuple[int, ...] = (1, 4, 16, 32)
    """Numbers of views at once for which peak memory is measured, each in its own process."""
    json: Path | None = None
    """Also write the results to this file, as JSON."""
    measure: int | None = None
    """Internal: make maps with this number of views at once and print the peak memory."""


def main(arguments: Arguments) -> None:
    """Compare, time, and measure memory."""
    if arguments.measure is not None:
        print(peak_mb(arguments))
        return
    figures = {"num_views": arguments.num_views, **timed(arguments)}
    figures["peak_mb"] = {}
    for bound in (0, *arguments.bounds):
        command = [sys.executable, "-m", "benchmarks.hotspots", "--checkpoint", str(arguments.checkpoint)]
        command += ["--data", str(arguments.data), "--num-views", str(arguments.num_views), "--measure", str(bound)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        figures["peak_mb"][str(bound)] = peak = int(output.split()[-1])
        print(f"peak memory, {f'{bound} views at once' if bound else 'before any map'}: {peak} MB", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1, allow_nan=False) + "\n")


def timed(arguments: Arguments) -> dict:
    """Maps per second of each way, in wall time and in CPU time, after a check that they agree."""
    import jax
    import jax.numpy as jnp

    torch, saliency = peer("torch"), peer("captum.attr").Saliency
    from benchmarks.torch_twin import Twin, windows_of
    from spinejax.data.dataset import DataSet
    from spinejax.geometry import INTENSITY_STEP
    from spinejax.inference import hotspots
    from spinejax.inference.hotspots import Method
    from spinejax.network import views
    from spinejax.network.cpu_kernels import with_cpu_kernels
    from spinejax.parallel import runtime
    from spinejax.training import checkpoint

    runtime.set_up()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    model, variables = checkpoint.load(arguments.checkpoint)
    model = with_cpu_kernels(model)
    data = DataSet(arguments.data)
    row = int(data.rows("test")[0])
    volume = data.volume(row).astype(np.float32) * INTENSITY_STEP
    names = [task.name for task in model.tasks]
    grades = np.array([task.num_grades - 1 for task in model.tasks])
    method = Method(num_views=arguments.num_views, views_at_once=arguments.num_views)
    keys = jax.random.split(jax.random.key(0), arguments.num_views)
    chosen = jax.jit(jax.vmap(lambda key: views.sample(key, method.ranges)))(keys)
    on_device = jax.device_put(variables)
    network = Twin(model, variables).eval()
    in_torch = torch.tensor(np.moveaxis(volume, -1, 0).copy())
    there, back = (torch.tensor(warp) for warp in warps(jax.tree.map(np.asarray, chosen)))
    slice_of, inside = slices_of(jax.tree.map(np.asarray, chosen))

    evidence = jax.jit(functools.partial(hotspots.evidence, model=model, method=method))
    discs = keys[0], on_device, jnp.asarray(volume), jnp.array([0, 15]), jnp.asarray(grades), chosen

    def spinejax():
        return np.asarray(evidence(*discs))

    def take():
        stacks = in_torch[torch.tensor(np.clip(slice_of + np.asarray(chosen.shift_slices)[:, None] + 3, 0, 14))]
        windows = torch.nn.functional.grid_sample(stacks, there, align_corners=False)
        return windows + torch.tensor(np.asarray(chosen.intensity))[:, None, None, None]

    def put_back(gradients):
        """float[V, T, 9, 112, 224] → float[T, 9, 112, 224], averaged by coverage."""
        maps = gradients.abs()
        seen = torch.nn.functional.grid_sample(torch.ones(len(maps), 1, *maps.shape[-2:]), back, align_corners=False)
        returned = torch.nn.functional.grid_sample(maps.flatten(1, 2), back, align_corners=False).view(maps.shape)
        returned = torch.stack([view[:, where] for view, where in zip(returned, returns, strict=True)])
        weight = seen * torch.tensor(inside)[:, :, None, None]
        returned = returned * torch.tensor(inside)[:, None, :, None, None]
        return returned.sum(0) / weight.sum(0).clamp(min=1e-9)

    returns = torch.tensor(returns_of(jax.tree.map(np.asarray, chosen)))
    attributions = [saliency(lambda windows, name=name: network(windows)[name]) for name in names]

    def captum():
        windows = take().requires_grad_()
        each = [
            saliency.attribute(windows, target=int(grade), abs=False)
            for saliency, grade in zip(attributions, grades, strict=True)
        ]
        return put_back(torch.stack(each, 1))

    def by_hand():
        windows = take().requires_grad_()
        scores = network(windows)
        own = [scores[name][:, grade].sum() for name, grade in zip(names, grades, strict=True)]
        each = [torch.autograd.grad(score, windows, retain_graph=True)[0] for score in own]
        return put_back(torch.stack(each, 1))

    windows = jax.jit(jax.vmap(views.take, in_axes=(None, 0)))(volume, chosen)
    agree(model, variables, network, windows, windows_of(windows), names, grades)
    ways: dict[str, Callable] = {"spinejax": spinejax, "captum": captum, "torch": by_hand}
    maps = {name: np.asarray(way()) for name, way in ways.items()}
    correlation = {}
    for name in ("captum", "torch"):
        other = np.moveaxis(maps[name], 1, -1)
        pairs = zip(maps["spinejax"], other, strict=True)
        correlation[name] = min(np.corrcoef(one.ravel(), two.ravel())[0, 1] for one, two in pairs)
        print(f"maps of {name} correlate with spinejax's by {correlation[name]:.4f} at least")
        if correlation[name] < 0.98:
            raise SystemExit("The maps do not agree: nothing to time.")

    wall: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(arguments.rounds):
        for name, way in ways.items():
            started, used = time.perf_counter(), time.process_time()
            way()
            wall[name].append(time.perf_counter() - started)
            cpu[name].append(time.process_time() - used)
    figures: dict = {"tasks": len(names), "rounds": arguments.rounds, "correlation": correlation}
    for name in ways:
        ratios = [mine / own for mine, own in zip(wall[name], wall["spinejax"], strict=True)]
        of_cpu = [mine / own for mine, own in zip(cpu[name], cpu["spinejax"], strict=True)]
        figures[name] = {
            "maps_per_second": len(names) / float(np.median(wall[name])),
            "cpu_seconds_per_disc": float(np.median(cpu[name])),
            "time_over_spinejax": {"median": np.median(ratios), "low": min(ratios), "high": max(ratios)},
            "cpu_over_spinejax": {"median": np.median(of_cpu), "low": min(of_cpu), "high": max(of_cpu)},
        }
        print(
            f"{name:9}{figures[name]['maps_per_second']:7.2f} maps/s, {np.median(cpu[name]):6.2f} s of CPU a disc; "
            f"{np.median(ratios):.2f} times spinejax's time ({min(ratios):.2f} to {max(ratios):.2f}), "
            f"{np.median(of_cpu):.2f} times its CPU time ({min(of_cpu):.2f} to {max(of_cpu):.2f})"
        )
    return figures


def agree(model, variables, network, windows, in_torch, names, grades) -> None:
    """Check that scores and gradients of the two networks agree to rounding on the same windows."""
    import jax

    torch = peer("torch")

    ours = jax.jit(model.apply)(variables, windows)
    leaves = in_torch.requires_grad_()
    theirs = network(leaves)
    for name, grade in zip(names, grades, strict=True):
        np.testing.assert_allclose(ours[name], theirs[name].detach(), rtol=1e-3, atol=1e-3)
        score = jax.jit(jax.grad(lambda w, name=name, grade=grade: model.apply(variables, w)[name][:, grade].sum()))
        (gradient,) = torch.autograd.grad(theirs[name][:, int(grade)].sum(), leaves, retain_graph=True)
        mine, other = np.asarray(score(windows)), np.moveaxis(gradient.numpy(), 1, -1)
        # Rounding may switch a pixel at the threshold of a ReLU or between two maxima of a pool.
        assert np.corrcoef(mine.ravel(), other.ravel())[0, 1] > 0.9999, name
    print("scores and gradients agree")


def warps(chosen) -> tuple[np.ndarray, np.ndarray]:
    """`grid_sample`'s grids: volume → windows, and windows → the identity window. float32[V, 112, 224, 2] each."""
    from spinejax.geometry import VOLUME_SHAPE, WINDOW_SHAPE

    rows, columns = (np.arange(size) - (size - 1) / 2 for size in WINDOW_SHAPE[:2])
    pixel = np.stack(np.meshgrid(rows, columns, indexing="ij"), -1)
    there, back = [], []
    for angle_deg, shift, scale in zip(chosen.angle_deg, chosen.shift_px, chosen.scale, strict=True):
        angle = np.deg2rad(angle_deg)
        turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        there.append((shift + pixel @ turn.T / scale) * 2 / VOLUME_SHAPE[:2])
        back.append((pixel - shift) @ turn * scale * 2 / WINDOW_SHAPE[:2])
    return tuple(np.stack(grids)[..., ::-1].astype(np.float32).copy() for grids in (there, back))


def slices_of(chosen) -> tuple[np.ndarray, np.ndarray]:
    """Each window's slices, counted from its first, and which slices of the identity window a view sees."""
    order = np.arange(9)
    windows = np.where(chosen.flip[:, None], order[::-1], order)
    source = order - chosen.shift_slices[:, None]
    return windows, ((source >= 0) & (source < 9)).astype(np.float32)


def returns_of(chosen) -> np.ndarray:
    """int[V, 9]. The window's slice for each slice of the identity window; an arbitrary one where there is none."""
    source = np.clip(np.arange(9) - chosen.shift_slices[:, None], 0, 8)
    return np.where(chosen.flip[:, None], 8 - source, source)


def peak_mb(arguments: Arguments) -> int:
    """Peak memory in MB of this process after it made maps with `measure` views at once; without maps if that is 0."""
    import jax

    from spinejax.data.dataset import DataSet
    from spinejax.inference import hotspots
    from spinejax.inference.hotspots import Method
    from spinejax.network.cpu_kernels import with_cpu_kernels
    from spinejax.parallel import runtime
    from spinejax.training import checkpoint

    runtime.set_up()
    model, variables = checkpoint.load(arguments.checkpoint)
    model = with_cpu_kernels(model)
    data = DataSet(arguments.data)
    rows = data.rows("test")[:1]
    if arguments.measure:
        batch = {
            "volume": data.volumes(rows),
            "slices": data.slices[rows].astype(np.int32),
            "grades": np.zeros((1, len(model.tasks)), np.int32),
            "row": rows.astype(np.int32),
        }
        method = Method(num_views=arguments.num_views, views_at_once=arguments.measure)
        for _ in range(3):
            hotspots.hotspot_step(jax.random.key(0), variables, batch, model=model, method=method).block_until_ready()
    # Not `getrusage`, whose peak a process inherits from the one that started it.
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) // 1024


if __name__ == "__main__":
    start("hotspots", Arguments, main)
