"""clric-bench: clric measured side by side with what users would pick instead.

- codecs.py: what is compared: clric, the latent that is not coded, Pillow's formats, CompressAI's zoo
- metrics.py: two images -> PSNR, SSIM, MS-SSIM, LPIPS, SSIMULACRA2; vgg.py: LPIPS-VGG and DISTS;
  fid.py: many images -> FID
- measure.py: one image, one codec, one setting -> one row of results.csv
- workers.py: the processes that do this, and fresh ones where memory is measured
- results.py: results.csv; what was measured already is not measured again
- run.py: all of the above, in order
- compare.py: rows -> means, BD-rates, nearest rates
- marks.py: which codec was trained on which measure
- pictures.py, report.py: plots, sheets of crops, summary.md, report.html
- cli.py: the command
"""
