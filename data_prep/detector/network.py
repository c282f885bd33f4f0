"""The network: a small U-Net over one slice.

Each cell says whether a body's centre is near and where that body's corners are; cells near a corner also say where
exactly it is. The first follows refs. 5 and 7 of the paper, which detect bodies slice by slice and then regress their
corners; the second is the short-range offset of PersonLab (Papandreou et al., 2018).
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from data_prep.detector.grid import CELL_PX

WIDTHS = (24, 48, 96, 128)  # channels at 3, 6, 12 and 24 mm a cell
NUM_CLASSES = 2  # centres of vertebral bodies, and the sacrum (S1): each has its own heat map


class BodyNet(nn.Module):
    """Slices → heat logits, offsets to corners from far, and from near.

    It normalises by batch statistics, so padding does not change the result.
    """

    widths: tuple[int, ...] = WIDTHS

    @nn.compact
    def __call__(
        self, images: Float[Array, "N H W"], *, train: bool
    ) -> tuple[Float[Array, "N h w 2"], Float[Array, "N h w 4 2"], Float[Array, "N h w 4 2"]]:
        """Find bodies in slices.

        Args:
            images: normalised, `PIXEL_MM` a pixel; H and W are multiples of 16.
            train: use and update the batch's statistics, instead of the stored ones.

        Returns:
            Logits of a centre of each class. Offsets (row, column) in `OFFSET_MM` from each cell to the corners of the
            body around it. Offsets from each cell to the nearest corner of each kind, of whichever body.
        """

        def layer(x, features, *, stride=1, kernel=3):
            x = nn.Conv(
                features, (kernel, kernel), strides=stride, use_bias=False, kernel_init=nn.initializers.he_normal()
            )(x)
            return nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.97)(x))

        # The pixels of a cell become its channels, so the coarser grid loses nothing.
        n, height, width = images.shape
        cells = images.reshape(n, height // CELL_PX, CELL_PX, width // CELL_PX, CELL_PX).swapaxes(2, 3)
        x = layer(cells.reshape(*cells.shape[:3], CELL_PX**2), self.widths[0])
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
