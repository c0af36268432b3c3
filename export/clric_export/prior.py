"""The causal prior of the training: how many bits a quantised latent costs, differentiably.

It stands in for the codec's auto-regressive model, which is fitted to each image: one small network for all images and
all quantiser steps, trained together with the encoder and the decoder so that latents become cheap to code.
"""

import torch
import torch.nn.functional as F
from clric_encoder.model.backends import LOG_SCALE_HIGH, LOG_SCALE_LOW
from torch import Tensor, nn

# The context: rows above and values to the left, in a window of this size over all channels.
KERNEL, WIDTH = 5, 48

# A coded symbol has a frequency of at least 1 in 65,536, and 64 symbols share the rest (bitstream_spec.md, section 4).
FREQUENCIES, SYMBOLS = 65_536, 64


class Prior(nn.Module):
    """Laplace distributions of the values of a quantised latent, from the values before them in raster order.

    A masked 5 x 5 convolution over all channels to 48 with a bias that is linear in the logarithm of the step, ReLU,
    and a 1 x 1 convolution to the mean and the logarithm of the scale for each channel; 90 MAC/pixel. It works on the
    dequantised latent, whose size does not depend on the step.
    """

    mask: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.context = nn.Conv2d(channels, WIDTH, KERNEL, padding=KERNEL // 2)
        self.slope = nn.Parameter(torch.zeros(WIDTH))
        self.head = nn.Conv2d(WIDTH, 2 * channels, 1)
        mask = torch.ones(KERNEL * KERNEL)
        mask[KERNEL * KERNEL // 2 :] = 0
        self.register_buffer("mask", mask.view(KERNEL, KERNEL), persistent=False)

    def forward(self, values: Tensor, step: Tensor) -> Tensor:
        """Bits of each value [N, C, h, w], in units of the step [N]: integers, or integers with uniform noise."""
        step = step[:, None, None, None]
        context = F.conv2d(values * step, self.context.weight * self.mask, self.context.bias, padding=KERNEL // 2)
        hidden = F.relu(context + self.slope[:, None, None] * step.log())
        mean, log_scale = self.head(hidden).chunk(2, 1)
        log_scale = (log_scale - step.log2()).clamp(LOG_SCALE_LOW, LOG_SCALE_HIGH)
        probability = laplace_probability(values - mean / step, log_scale.exp2())
        return -torch.log2((probability * (FREQUENCIES - SYMBOLS) + 1) / FREQUENCIES)


def laplace_probability(distance: Tensor, scale: Tensor) -> Tensor:
    """The probability of the unit interval around a value at this distance from the mean."""
    distance = distance.abs()
    far = torch.exp(-(distance + 0.5) / scale)
    near = torch.exp(-(distance - 0.5).abs() / scale)
    return 0.5 * ((1 - far) + torch.sign(0.5 - distance) * (1 - near))
