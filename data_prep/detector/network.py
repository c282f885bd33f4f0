"""The networks: one finds the bodies in a slice and its two neighbours, the other the ends of one endplate in a patch.

In the first, each cell predicts whether a body's centre is near, and where that body's corners are. Cells near a corner
also predict its exact position. Centres and their offsets to corners follow refs. 5 and 7 of the paper, which detect
bodies slice by slice and then regress their corners. The offsets near a corner are PersonLab's short-range offsets
(Papandreou et al., 2018). The second gives each end as the mean place of a heat map, which is not tied to the cells
(Sun et al., Integral Human Pose Regression, 2018).

Both are small U-Nets. They use batch normalisation: with normalisation per image, padding would change the result.
"""

from collections.abc import Callable, Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from data_prep.detector.grid import CELL_PX

WIDTHS = (24, 48, 96, 128)  # channels at 3, 6, 12 and 24 mm per cell
NUM_CLASSES = 2  # one heat map each: centres of vertebral bodies, and of the sacrum (S1)
ENDPLATE_WIDTHS = (16, 24, 24)  # channels at 2, 4 and 8 pixels per cell
PATCH_SHAPE = (48, 64)  # rows from the body's outside in, columns from front to back


class BodyNet(nn.Module):
    """Slices → logits of heat maps, offsets to corners from a body's cells, offsets to corners from nearby cells."""

    widths: tuple[int, ...] = WIDTHS

    @nn.compact
    def __call__(
        self, images: Float[Array, "N H W 3"], *, train: bool
    ) -> tuple[Float[Array, "N h w 2"], Float[Array, "N h w 4 2"], Float[Array, "N h w 4 2"]]:
        """Find bodies in slices.

        Args:
            images: normalised, `PIXEL_MM` per pixel; H and W are multiples of 16. The slice is in the middle channel,
                its neighbours are in the others; one that is missing is zero.
            train: use and update the batch's statistics, instead of the stored ones.

        Returns:
            Heat-map logits of each class. Offsets (row, column) in `OFFSET_MM` from each cell to the corners of the
            body around it. Offsets from each cell to the nearest corner of each kind, of any body.
        """
        x = _features(images, self.widths, train)
        low_bias = nn.initializers.constant(-4.0)  # nearly every cell has no centre
        heat = nn.Conv(NUM_CLASSES, (1, 1), bias_init=low_bias, name="heat")(x)
        far, near = (nn.Conv(8, (1, 1), name=name)(x).reshape(*x.shape[:-1], 4, 2) for name in ("offsets", "nearby"))
        return heat, far, near


class EndplateNet(nn.Module):
    """Patches with one roughly placed endplate each → where its two ends are."""

    widths: tuple[int, ...] = ENDPLATE_WIDTHS

    @nn.compact
    def __call__(self, patches: Float[Array, "N H W"], *, train: bool) -> Float[Array, "N 2 2"]:
        """Find the ends of endplates.

        Args:
            patches: of `PATCH_SHAPE`, as `endplates.patches` takes them. Their brightness and contrast do not count.
            train: use and update the batch's statistics, instead of the stored ones.

        Returns:
            (row, column) in pixels from the middle of the patch: the end at the front, and the end at the back.
        """
        mean, std = (statistic(patches, axis=(1, 2), keepdims=True) for statistic in (jnp.mean, jnp.std))
        x = _features(((patches - mean) / (std + 1e-3))[..., None], self.widths, train)
        heat = nn.Conv(2, (1, 1), name="heat")(x)
        share = jax.nn.softmax(heat.reshape(len(heat), -1, 2), axis=1).reshape(heat.shape)
        rows, columns = (CELL_PX * (jnp.arange(n, dtype=jnp.float32) - (n - 1) / 2) for n in heat.shape[1:3])
        return jnp.stack([jnp.einsum("nhwe,h->ne", share, rows), jnp.einsum("nhwe,w->ne", share, columns)], axis=-1)


def _features(images: Float[Array, "N H W C"], widths: Sequence[int], train: bool) -> Float[Array, "N h w F"]:
    """A U-Net's features of each cell of `CELL_PX` × `CELL_PX` pixels. To be called in a module's compact method."""
    layer: Callable[..., Array] = partial(_layer, train=train)
    # The pixels of a cell become its channels, so the coarser grid loses nothing.
    n, height, width, channels = images.shape
    cells = images.reshape(n, height // CELL_PX, CELL_PX, width // CELL_PX, CELL_PX, channels).swapaxes(2, 3)
    x = layer(cells.reshape(*cells.shape[:3], CELL_PX**2 * channels), widths[0])
    x = layer(x, widths[0])
    skips = [x]
    for features in widths[1:]:
        x = layer(x, features, stride=2)
        x = x + layer(layer(x, features), features)
        skips.append(x)
    for skip in reversed(skips[:-1]):
        x = layer(x, skip.shape[-1], kernel=1)
        x = skip + jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        x = x + layer(x, skip.shape[-1])
    return x


def _layer(x: Array, features: int, *, train: bool, stride: int = 1, kernel: int = 3) -> Array:
    """A convolution without bias, batch normalisation, ReLU."""
    x = nn.Conv(features, (kernel, kernel), strides=stride, use_bias=False, kernel_init=nn.initializers.he_normal())(x)
    return nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.97)(x))
