"""The paper's tables and figures as declarative files, and experiments of our own: ``files/*.toml``, one each.

A recipe has a ``title`` and says ``about`` itself what it repeats and where it departs from it. Its ``options`` are
those of ``wellcond train``, for every run; each of its ``rows`` changes some. ``scales`` has by name what makes it
smaller. ``like`` names a recipe of which everything is taken that is not said, and ``keep`` the rows to take and, among
them, the places of its own.
"""

from wellcond.experiments.recipes.load import known_recipes, load_recipe, recipe_text
from wellcond.experiments.recipes.recipe import FULL, PaperFigures, Recipe, Row

__all__ = ["FULL", "PaperFigures", "Recipe", "Row", "known_recipes", "load_recipe", "recipe_text"]
