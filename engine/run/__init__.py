"""A run: recipe, check, assembly, loop, replay; and the rank that does all of it."""
