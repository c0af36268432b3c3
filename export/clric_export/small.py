"""The architectures of distillation: an encoder of TAESD's kind, and a decoder that works at low resolution."""

import torch.nn.functional as F
from clric_decoder.models import ENCODER_SHAPES
from diffusers.models.autoencoders.vae import EncoderTiny
from torch import Tensor, nn


def small_encoder(channels: int) -> nn.Sequential:
    """Image [N, 3, 8h, 8w], RGB in [0, 1] -> latent [N, C, h, w], with random weights; 34,000 MAC/pixel."""
    blocks, width = ENCODER_SHAPES["lite"]
    return EncoderTiny(3, channels, blocks, (width,) * len(blocks), "relu").layers


class Block(nn.Module):
    """x + conv(ReLU(conv(x))), 3 x 3."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.second.weight)  # the identity at first

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.relu(self.first(x)))


class SmallDecoder(nn.Module):
    """Latent [N, C, h, w] -> image [N, 3, 8h, 8w], RGB in [0, 1] (in training mode about that); 17,000 MAC/pixel.

    ``widths``, ``blocks``: channels and residual blocks at 1/8, 1/4 and 1/2 of the image's size. Convolutions to
    four times the channels and pixel shuffles lead from one size to the next, and from the last to the pixels.
    """

    def __init__(
        self, channels: int, widths: tuple[int, ...] = (96, 32, 16), blocks: tuple[int, ...] = (4, 2, 1)
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, widths[0], 3, padding=1), nn.ReLU()]
        for width, count, following in zip(widths, blocks, [*widths[1:], 3], strict=True):
            layers += [Block(width) for _ in range(count)]
            layers += [nn.Conv2d(width, 4 * following, 3, padding=1), nn.PixelShuffle(2), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, latent: Tensor) -> Tensor:
        image = self.layers(latent) + 0.5
        return image if self.training else image.clamp(0, 1)  # beyond the clamp there is no gradient
