"""Thin commands over engine and models."""
