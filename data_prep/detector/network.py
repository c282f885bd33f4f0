"""The network: a small U-Net that tells, in each cell of a slice, whether a body's centre is near and where its corners
are from there, and, in the cells about a corner, where exactly it is. After refs. 5 and 7 of the paper, which detect
bodies slice by slice and then regress their corners; the second look at a corner is that of PersonLab (Papandreou et
al., 2018, short-range offsets).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from data_prep.detector.grid import CELL_PX

WIDTHS = (24, 48, 96, 128)
"""Channels at 3, 6, 12 and 24 mm a cell."""

NUM_CLASSES = 2
"""Centres of vertebral bodies, and the sacrum (S1), each with a heat-map of its own."""


class BodyNet(nn.Module):
    """Slices → (heat logits, ways to corners from far, and from near).

    Normalised by batch statistics, so that padding changes no answer.

    Args:
        widths: channels from the finest level to the coarsest.
    """

    widths: tuple[int, ...] = WIDTHS

    @nn.compact
    def __call__(self, images, *, train: bool):
        """Look at slices.

        Args:
            images: float32[N, H, W], normalised, `PIXEL_MM` a pixel; H and W are multiples of `BLOCK_PX`.
            train: use and update the batch's statistics, instead of the stored ones.

        Returns:
            float32[N, H/2, W/2, 2], logits of a centre (`NUM_CLASSES`); float32[N, H/2, W/2, 4, 2], the way from the
            cell to each corner of the body about it, (row, column), in `OFFSET_MM`; likewise, the way to each kind of
            corner's nearest one, of whichever body.
        """

        def layer(x, features, *, stride=1, kernel=3):
            x = nn.Conv(
                features, (kernel, kernel), strides=stride, use_bias=False, kernel_init=nn.initializers.he_normal()
            )(x)
            return nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.97)(x))

        x = layer(_fold(images[..., None], CELL_PX), self.widths[0])
        x = layer(x, self.widths[0])
        skips = [x]
        for features in self.widths[1:]:
            x = layer(x, features, stride=2)
            x = x + layer(layer(x, features), features)
            skips.append(x)
        for skip in reversed(skips[:-1]):
            x = layer(x, skip.shape[-1], kernel=1)
            x = skip + jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
            x = x + layer(x, skip.shape[-1])
        rare = nn.initializers.constant(-4.0)  # nearly every cell has no centre
        heat = nn.Conv(NUM_CLASSES, (1, 1), bias_init=rare, name="heat")(x)
        far, near = (nn.Conv(8, (1, 1), name=name)(x).reshape(*x.shape[:-1], 4, 2) for name in ("offsets", "nearby"))
        return heat, far, near


def _fold(x: jax.Array, block: int) -> jax.Array:
    """[N, H, W, C] → [N, H/b, W/b, b·b·C]: blocks of pixels become channels, so nothing is lost by a coarser grid."""
    n, height, width, channels = x.shape
    x = x.reshape(n, height // block, block, width // block, block, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(n, height // block, width // block, block * block * channels)
