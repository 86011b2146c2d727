"""The command line: arguments in, messages and exit codes out. Imports the work when a command needs it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from paralign import __version__
from paralign.models.errors import LayoutError, ParalignError

app = typer.Typer(
    help="Alignment training of large language models, from Hugging Face weights to Hugging Face weights.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RecipePath = Annotated[
    Path, typer.Argument(help="A recipe, such as recipes/sft/llama3_8b.yaml.", metavar="RECIPE")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Keys to set, such as optimizer.lr=1e-5.", metavar="[KEY=VALUE]...")
]


def main() -> None:
    """The `paralign` command. An error that the user can mend ends it with a message and exit code 2."""
    try:
        app()
    except ParalignError as error:
        console = Console(stderr=True, highlight=False, soft_wrap=True)
        console.print("[bold red]error:[/]", end=" ")
        console.print(str(error), markup=False)
        sys.exit(2)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"paralign {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    pass


@app.command()
def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    nproc: Annotated[
        int | None, typer.Option(min=1, help="Ranks to start; default: all GPUs, without any tp × pp.")
    ] = None,
) -> None:
    """Check a recipe, then train it on this machine.

    Over several machines, start `paralign.engine.run` by torchrun or srun instead.
    """
    from .check import check
    from .launch import rank_environment, run_local
    from .recipe import load

    world_size = rank_environment().world_size
    if world_size > 1:
        raise LayoutError(
            f"paralign train starts its own ranks, and this is already one of {world_size}; "
            f"under torchrun use `-m paralign.engine.run {recipe}`, "
            f"under srun `python -m paralign.engine.run {recipe}`"
        )
    loaded = load(recipe, overrides or ())
    # Bad input ends here, before any rank starts, and the data is tokenised once.
    report = check(loaded, nproc or _gpus(), progress=True)
    raise typer.Exit(run_local(recipe, overrides or (), report.layout.world_size))


@app.command()
def launch(
    recipe: RecipePath,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs of each; a rank runs on each GPU.")] = 8,
    partition: Annotated[str | None, typer.Option(help="SLURM's partition.")] = None,
    account: Annotated[str | None, typer.Option(help="SLURM's account.")] = None,
    time: Annotated[str | None, typer.Option(help="Time limit, such as 2-00:00:00.")] = None,
    requeue: Annotated[bool, typer.Option(help="Queue again when the time limit stops the run.")] = False,
    print_only: Annotated[bool, typer.Option("--print", help="Show the script and submit nothing.")] = False,
) -> None:
    """Check a recipe, then submit it to SLURM."""
    from .check import check
    from .recipe import load
    from .slurm import Job, batch_script, submit

    loaded = load(recipe, overrides or ())
    job = Job(nodes, gpus_per_node, partition, account, time, requeue)
    script = batch_script(recipe.resolve(), overrides or (), job, run_dir=loaded.run_dir)
    if print_only:
        typer.echo(script, nl=False)
        return
    check(loaded, nodes * gpus_per_node, progress=True)
    typer.echo(submit(script, run_dir=loaded.run_dir))


@app.command("check")
def check_command(
    recipe: RecipePath,
    overrides: Overrides = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="GPUs to check for; default: tp × pp.")] = None,
) -> None:
    """Check a recipe against its model, its data and a number of GPUs."""
    from .check import check
    from .recipe import load

    Console(highlight=False).print(check(load(recipe, overrides or ()), gpus, progress=True))


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A checkpoint, …/iter_0000100.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="A directory that is not there yet.")],
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"] | None, typer.Option(help="Default: as they are.")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest file, such as 5GB.")] = "5GB",
    verify: Annotated[bool, typer.Option(help="Read the result back and compare.")] = True,
) -> None:
    """Convert a checkpoint to a Hugging Face directory, tensor by tensor."""
    from .convert import convert as convert_weights

    report = convert_weights(source, destination, dtype=dtype, max_shard_size=max_shard_size, verify=verify)
    typer.echo(
        f"{destination}: {report.tensors} tensors, {report.parameters:,} parameters, {report.files} files in "
        f"{report.seconds:.1f} s{', read back bit-equal' if report.verified else ''}"
    )


@app.command()
def plot(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Directories of runs.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The picture to write.")],
) -> None:
    """Draw the loss curves of runs."""
    from .observe.plot import plot_runs

    plot_runs(runs, output)
    typer.echo(f"wrote {output}")


def _gpus() -> int | None:
    import torch

    return torch.cuda.device_count() or None


if __name__ == "__main__":
    main()
