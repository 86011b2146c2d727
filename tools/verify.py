"""Check a model against its manifest, or two with each other: `paralign verify` as a script."""

import typer

from paralign.engine.cli import verify

if __name__ == "__main__":
    typer.run(verify)
