"""The export package of clric: the decoder half of a diffusers VAE becomes an ONNX file that clric-dec runs."""
