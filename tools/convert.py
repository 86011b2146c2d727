"""Convert a model between Hugging Face's form and the native one: `paralign convert` as a script."""

import typer

from paralign.engine.cli import convert

if __name__ == "__main__":
    typer.run(convert)
