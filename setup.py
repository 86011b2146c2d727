"""Package build; everything it declares stands in pyproject.toml."""

from setuptools import setup

setup()
