"""Recipes: a mergekit YAML plus masks, built through mergekit or exported to a form that stock mergekit runs.

Importing this package imports neither torch nor mergekit; see `schema.load_recipe`, `build.build`, `export.export`.
"""
