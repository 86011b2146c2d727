"""Merge several models of one shape into one: `paralign merge` as a script."""

import typer

from paralign.engine.cli import merge

if __name__ == "__main__":
    typer.run(merge)
