"""The experiments behind the command line. Each part imports only from those before it:

- ``errors``, ``files``, ``folders``: user errors, atomic writes, and output folders protected against data loss;
- ``data``: images from a name, a path or arrays, split and batched;
- ``run``: one training run, from its configuration to its result;
- ``latents``: the same of a generator, and the measures of its latent directions;
- ``recipes``: the paper's tables and figures as configurations;
- ``results``: finished runs, statistics over seeds, and tables;
- ``grid``: many runs, one after another, in parallel processes, or on a Ray cluster;
- ``show``: tables for the terminal and in Markdown, figures, and the report page;
- ``compare``, ``compare_generators``, ``report``, ``inspect``: one per command.
"""
