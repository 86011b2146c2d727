"""Answers of the model in training."""
