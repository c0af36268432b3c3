"""FID (Heusel et al., 2017) over patches: features of decoded images, and how far they are from the originals'.

`frechet_distance` is FD-VGG16's too, whose features are vgg.py's: another number, on another scale, which must not be
called FID.

Patches are cut without overlap from the image's top left corner; what remains at the right and at the bottom is left.
"""

import math
from typing import Any

import numpy as np

FID_PATCH = 256
FID_WEIGHTS = "inception-2015-12-05.pt"


def fid_features(image: np.ndarray, inception: Any) -> np.ndarray:
    """Features (patches, 2048) float64 of an image's whole `FID_PATCH` patches.

    inception: the TorchScript module `FID_WEIGHTS` (the network of the original FID, converted by NVIDIA for
    StyleGAN), which takes uint8 [N, 3, 256, 256].
    """
    import torch

    height, width = (side - side % FID_PATCH for side in image.shape[:2])
    rows, columns = height // FID_PATCH, width // FID_PATCH
    patches = image[:height, :width].reshape(rows, FID_PATCH, columns, FID_PATCH, 3).transpose(0, 2, 4, 1, 3)
    batch = torch.from_numpy(patches.reshape(-1, 3, FID_PATCH, FID_PATCH).copy())
    if not len(batch):
        return np.zeros((0, 2048))
    with torch.inference_mode():
        features: np.ndarray = inception(batch, return_features=True).double().numpy()
    return features


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """The Frechet distance of the Gaussians fitted to two sets of features (count, dimensions), at least 2 of each.

    |mean difference|^2 + trace(A + B - 2 sqrt(A B)) for covariances A, B. With centred features X and Y, scaled so
    that A = X'X and B = Y'Y, the trace of the root is the sum of the singular values of X Y': this is exact, and small
    where there are fewer patches than dimensions.
    """
    x, y = ((features - features.mean(0)) / math.sqrt(len(features) - 1) for features in (a, b))
    root = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    return float(np.square(a.mean(0) - b.mean(0)).sum() + np.square(x).sum() + np.square(y).sum() - 2 * root)
