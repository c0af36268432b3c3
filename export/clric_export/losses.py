"""The loss of image decoders in training that clric-enc does not have: features of SqueezeNet (LPIPS).

Images are [N, 3, H, W] float32, RGB in [0, 1].
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from clric_decoder.errors import ModelError, brief
from torch import Tensor, nn

# The torchvision layers of squeezenet1_1 after whose last one LPIPS compares features.
_LPIPS_SLICES = ((0, 1), (3, 4), (6, 7), (9,), (10,), (11,), (12,))


class Lpips(nn.Module):
    """LPIPS v0.1 with SqueezeNet (Zhang et al., "The unreasonable effectiveness of deep features", 2018).

    ``folder`` holds squeezenet1_1_torchvision_fp16.npz, torchvision's weights under its names, and
    lpips_v0.1_squeeze_heads.pth, the published linear heads. Raises ModelError where they cannot be read.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, folder: Path) -> None:
        super().__init__()
        try:
            with np.load(folder / "squeezenet1_1_torchvision_fp16.npz") as file:
                state = {name: torch.from_numpy(file[name]).float() for name in file.files}
            heads = torch.load(folder / "lpips_v0.1_squeeze_heads.pth", map_location="cpu", weights_only=True)
            self._weights = nn.ParameterDict({name.replace(".", "_"): value for name, value in state.items()})
            self._heads = nn.ParameterList([heads[f"lin{i}.model.1.weight"] for i in range(len(_LPIPS_SLICES))])
        except Exception as error:  # numpy, zipfile and pickle share no base class for a damaged file
            raise ModelError(f"{folder} does not contain LPIPS weights: {brief(error)}") from error
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None])
        self.requires_grad_(False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """The mean distance of two batches of images with sides of at least 32."""
        result = a.new_zeros(())
        for head, x, y in zip(self._heads, self._features(a), self._features(b), strict=True):
            # The published 1e-10 stands inside the root, where it keeps the gradient of all zeros finite.
            x = x / (x.square().sum(1, keepdim=True) + 1e-20).sqrt()
            y = y / (y.square().sum(1, keepdim=True) + 1e-20).sqrt()
            result = result + F.conv2d((x - y).square(), head).mean()
        return result

    def _features(self, image: Tensor) -> list[Tensor]:
        x = (2 * image - 1 - self.shift) / self.scale
        features = []
        for layers in _LPIPS_SLICES:
            for layer in layers:
                if layer == 0:
                    x = F.relu(self._convolve(x, "features_0", stride=2))
                elif layer > 1:
                    x = F.relu(self._convolve(x, f"features_{layer}_squeeze"))
                    branches = [
                        self._convolve(x, f"features_{layer}_expand1x1"),
                        self._convolve(x, f"features_{layer}_expand3x3", padding=1),
                    ]
                    x = F.relu(torch.cat(branches, 1))
            features.append(x)
            if layers[-1] in (1, 4, 7):
                x = F.max_pool2d(x, 3, 2, ceil_mode=True)
        return features

    def _convolve(self, x: Tensor, name: str, stride: int = 1, padding: int = 0) -> Tensor:
        weights = self._weights
        return F.conv2d(x, weights[f"{name}_weight"], weights[f"{name}_bias"], stride, padding)
