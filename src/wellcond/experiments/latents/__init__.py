"""Generators with latent directions: their training, one run at a time, and what the directions have learnt.

- ``config``, ``images``: the options of a run, and images without labels;
- ``generator``, ``discriminator``: an EigenGAN-like and a plain generator, and their critic;
- ``training``, ``train``: an adversarial training, its exactly resumable state, and a run in a folder;
- ``observer``, ``measures``, ``judge``: the known factors of an image, and measures of quality and disentanglement;
- ``conditioning``, ``pictures``, ``progress``, ``result``, ``table``: condition numbers, grids of images, and what a
  run shows and leaves.
"""
