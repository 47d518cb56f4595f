"""What the command line runs. Each of these imports only from those before it:

- ``errors``, ``files``, ``folders``: messages for the user, whole files, and folders in which nothing is lost;
- ``data``: images from a name, a path or arrays, split, and in batches;
- ``run``: one training from its configuration to its result;
- ``results``: finished runs, the table over seeds, and every table as data;
- ``show``: tables for the terminal and in Markdown, figures, and the page of a report;
- ``compare``, ``report``, ``inspect``: one command, one file.
"""
