"""Paralign: alignment training of large language models, from Hugging Face weights to Hugging Face weights."""

__version__ = "0.1.0"
