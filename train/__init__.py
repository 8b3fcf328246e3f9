"""Recipes, data, the training loop and the `vlmamba` command."""
