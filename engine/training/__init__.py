"""A model that learns: what it is built from, its steps, its optimizer, its state on disk."""
