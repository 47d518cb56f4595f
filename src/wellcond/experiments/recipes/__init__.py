"""The paper's tables and figures, and further experiments, as declarative files ``files/*.toml``.

A recipe has a ``title`` and a text ``about`` what it reproduces and where it deviates. Its ``options`` are those of
``wellcond train`` for every run, or with ``task = "generator"`` those of ``wellcond latents``; each of its ``rows``
changes some, and each of its ``scales`` makes it smaller.
``like`` names a base recipe that provides everything not given, and ``keep`` lists the rows to take over, in order.
"""

from wellcond.experiments.recipes.load import known_recipes, load_recipe, recipe_text
from wellcond.experiments.recipes.recipe import FULL, PaperFigures, Recipe, Row
from wellcond.experiments.recipes.tasks import GENERATOR

__all__ = ["FULL", "GENERATOR", "PaperFigures", "Recipe", "Row", "known_recipes", "load_recipe", "recipe_text"]
