"""The network: a small U-Net over one slice and its two neighbours.

Each cell predicts whether a body's centre is near, and where that body's corners are. Cells near a corner also predict
its exact position. Centres and their offsets to corners follow refs. 5 and 7 of the paper, which detect bodies slice by
slice and then regress their corners. The offsets near a corner are PersonLab's short-range offsets (Papandreou et al.,
2018).
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from data_prep.detector.grid import CELL_PX

WIDTHS = (24, 48, 96, 128)  # channels at 3, 6, 12 and 24 mm per cell
NUM_CLASSES = 2  # one heat map each: centres of vertebral bodies, and of the sacrum (S1)


class BodyNet(nn.Module):
    """Slices → logits of heat maps, offsets to corners from a body's cells, and offsets to corners from nearby cells.

    It uses batch normalisation: with normalisation per image, padding would change the result.
    """

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

        def layer(x, features, *, stride=1, kernel=3):
            x = nn.Conv(
                features, (kernel, kernel), strides=stride, use_bias=False, kernel_init=nn.initializers.he_normal()
            )(x)
            return nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.97)(x))

        # The pixels of a cell become its channels, so the coarser grid loses nothing.
        n, height, width, slices = images.shape
        cells = images.reshape(n, height // CELL_PX, CELL_PX, width // CELL_PX, CELL_PX, slices).swapaxes(2, 3)
        x = layer(cells.reshape(*cells.shape[:3], CELL_PX**2 * slices), self.widths[0])
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
        low_bias = nn.initializers.constant(-4.0)  # nearly every cell has no centre
        heat = nn.Conv(NUM_CLASSES, (1, 1), bias_init=low_bias, name="heat")(x)
        far, near = (nn.Conv(8, (1, 1), name=name)(x).reshape(*x.shape[:-1], 4, 2) for name in ("offsets", "nearby"))
        return heat, far, near
