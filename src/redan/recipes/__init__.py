"""Recipes: one YAML file for everything that a run needs."""
