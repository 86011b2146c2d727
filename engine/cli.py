"""The command line: arguments in, messages and exit codes out. Imports the work when a command needs it."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from paralign import __version__
from paralign.models.errors import LayoutError, ParalignError

from .files.refused import told

if TYPE_CHECKING:
    from .checkpoint.writing import Report

app = typer.Typer(
    help="Alignment training of large language models, from Hugging Face weights to Hugging Face weights.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

data_app = typer.Typer(help="Look at the data of a recipe.", no_args_is_help=True)
app.add_typer(data_app, name="data")

kernels_app = typer.Typer(help="List the fused operations, or build them.", add_completion=False)
app.add_typer(kernels_app, name="kernels")

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
    except (ParalignError, OSError) as raised:
        error = told(raised)
        if not isinstance(error, ParalignError):
            raise
        console = Console(stderr=True, highlight=False, soft_wrap=True)
        console.print("[bold red]error:[/]", end=" ")
        # A name in a file may hold what no terminal can show.
        console.print(str(error).encode(errors="backslashreplace").decode(), markup=False)
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
    replay_step: Annotated[
        int | None,
        typer.Option(min=0, help="Train nothing; show what each pack of this step does alone."),
    ] = None,
    resave: Annotated[
        bool,
        typer.Option(
            "--resave", help="Train nothing; write the newest checkpoint again, so that any layout loads it."
        ),
    ] = False,
) -> None:
    """Check a recipe, then train it on this machine.

    Over several machines, start `paralign.engine.run` by torchrun or srun instead.
    """
    from .backends import check_kernels
    from .processes.launch import rank_environment, run_local
    from .processes.stop import Stop
    from .run.check import check
    from .run.rank import REPLAY, RESAVE
    from .run.recipe import load

    world_size = rank_environment().world_size
    if world_size > 1:
        raise LayoutError(
            f"paralign train starts its own ranks, and this is already one of {world_size}; "
            f"under torchrun use `-m paralign.engine.run {recipe}`, "
            f"under srun `python -m paralign.engine.run {recipe}`"
        )
    loaded = load(recipe, overrides or ())
    check_kernels(loaded.model)
    # Bad input ends here, before any rank starts, and the data is tokenised once.
    with Stop():
        report = check(loaded, nproc or _gpus(), progress=True)
    again = [RESAVE] if resave else [] if replay_step is None else [f"{REPLAY}{replay_step}"]
    raise typer.Exit(run_local(recipe, [*(overrides or ()), *again], report.layout.world_size))


@app.command()
def preflight(
    recipe: RecipePath,
    overrides: Overrides = None,
    nproc: Annotated[
        int | None, typer.Option(min=1, help="Ranks to start; default: all GPUs, without any tp × pp.")
    ] = None,
) -> None:
    """Check this machine for a recipe in a minute: devices, links, memory, disks.

    Over several machines, start `paralign.engine.run.preflight` by torchrun or srun instead; then clocks and versions
    are compared, and whether all see one run_dir.
    """
    from .processes.launch import run_local
    from .run.recipe import load

    world_size = nproc or _gpus() or math.prod(load(recipe, overrides or ()).layout.model_axes.values())
    raise typer.Exit(run_local(recipe, overrides or (), world_size, module="paralign.engine.run.preflight"))


@app.command()
def launch(
    recipe: RecipePath,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs of each; a rank runs on each GPU.")] = 8,
    partition: Annotated[str | None, typer.Option(help="SLURM's partition.")] = None,
    account: Annotated[str | None, typer.Option(help="SLURM's account.")] = None,
    time: Annotated[str | None, typer.Option(help="Time limit, such as 2-00:00:00.")] = None,
    cpus_per_task: Annotated[
        int | None, typer.Option(min=1, help="Cores of each rank; default: an equal share of the node.")
    ] = None,
    mem: Annotated[str, typer.Option(help="Memory of a node, such as 900G; 0 is all of it.")] = "0",
    exclusive: Annotated[bool, typer.Option(help="Share the nodes with nobody.")] = True,
    requeue: Annotated[bool, typer.Option(help="Queue again when the time limit stops the run.")] = False,
    sbatch: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME[=VALUE]", help="Any other option of sbatch; may be given several times."),
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="A variable of every rank; may be given several times."),
    ] = None,
    print_only: Annotated[
        bool,
        typer.Option(
            "--print",
            help="Show the script; check and submit nothing. Its warning comes 10 minutes before the time limit; "
            "the check gives a longer one where a save takes long.",
        ),
    ] = False,
) -> None:
    """Check a recipe, then submit it to SLURM."""
    from .processes.slurm import Job, batch_script, options_of, submit, variables_of
    from .run.check import check
    from .run.recipe import load

    loaded = load(recipe, overrides or ())
    save_seconds = 0.0
    if not print_only:
        save_seconds = check(loaded, nodes * gpus_per_node, progress=True).save_seconds
    job = Job(
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        partition=partition,
        account=account,
        time=time,
        cpus_per_task=cpus_per_task,
        mem=mem,
        exclusive=exclusive,
        requeue=requeue,
        save_seconds=save_seconds,
        others=options_of(sbatch or ()),
        env=variables_of(env or ()),
    )
    script = batch_script(recipe.resolve(), overrides or (), job, run_dir=loaded.run_dir)
    typer.echo(script if print_only else submit(script, run_dir=loaded.run_dir), nl=not print_only)


@app.command("check")
def check_command(
    recipe: RecipePath,
    overrides: Overrides = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="GPUs to check for; default: tp × pp.")] = None,
) -> None:
    """Check a recipe against its model, its data and a number of GPUs."""
    from .run.check import check
    from .run.recipe import load

    Console(highlight=False).print(check(load(recipe, overrides or ()), gpus, progress=True))


Dtype = Annotated[
    Literal["bfloat16", "float16", "float32"] | None, typer.Option(help="Default: as they are.")
]
Destination = Annotated[Path, typer.Argument(metavar="DST", help="A directory that is not there yet.")]
Form = Annotated[
    Literal["hf", "native"] | None,
    typer.Option("--to", help="Hugging Face or native checkpoint; default: the other one than SRC."),
]
ShardSize = Annotated[str, typer.Option(help="Largest file, such as 5GB.")]
Workers = Annotated[int, typer.Option(min=1, help="Files at a time; memory grows with them.")]


@app.command()
def convert(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="A Hugging Face directory, or a checkpoint …/iter_0000100.")
    ],
    destination: Annotated[
        Path | None, typer.Argument(metavar="[DST]", help="A directory that is not there yet.")
    ] = None,
    to: Form = None,
    dtype: Dtype = None,
    max_shard_size: ShardSize = "5GB",
    verify: Annotated[bool, typer.Option(help="Read the result back and compare.")] = True,
    workers: Workers = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the weight rules of a layout; write nothing.")
    ] = False,
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel degree of --dry-run.")] = 1,
    pp: Annotated[int, typer.Option(min=1, help="Pipeline-parallel degree of --dry-run.")] = 1,
) -> None:
    """Convert a model between Hugging Face's form and the native one, tensor by tensor."""
    from .checkpoint.convert import convert as convert_weights
    from .checkpoint.rule_table import rule_table
    from .checkpoint.writing import dtype_named

    if dry_run:
        for line in rule_table(source, tp=tp, pp=pp, dtype=None if dtype is None else dtype_named(dtype)):
            typer.echo(line)
        return
    if destination is None:
        raise typer.BadParameter("needed unless --dry-run is given", param_hint="DST")
    report = convert_weights(
        source,
        destination,
        to=to,
        dtype=dtype,
        max_shard_size=max_shard_size,
        verify=verify,
        workers=workers,
    )
    typer.echo(f"{destination}: {_written(report)}")


@app.command()
def verify(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A model, in either form.")],
    other: Annotated[
        Path | None, typer.Argument(metavar="[OTHER]", help="Compare with this one, not with the manifest.")
    ] = None,
    workers: Workers = 1,
) -> None:
    """Check a model or a run's checkpoint against its manifest.json, or two models with each other, bit by bit."""
    from .checkpoint.verify import check_against_manifest, compare

    if other is None:
        differences = check_against_manifest(directory, workers=workers)
    else:
        differences = compare(directory, other, workers=workers)
    for difference in differences:
        typer.echo(f"{difference.name}: {difference.what}")
    what = "files and tensors" if other is None else "tensors"
    against = "its manifest" if other is None else str(other)
    if differences:
        typer.echo(f"{directory}: {len(differences)} {what} differ from {against}", err=True)
        raise typer.Exit(1)
    typer.echo(f"{directory}: all {what} are as in {against}")


@app.command()
def merge(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A merge in MergeKit's YAML.")],
    destination: Destination,
    to: Annotated[Literal["hf", "native"], typer.Option(help="Form of the result.")] = "hf",
    max_shard_size: ShardSize = "5GB",
    seed: Annotated[int, typer.Option(min=0, help="Of what dare_ties drops.")] = 0,
    workers: Workers = 1,
) -> None:
    """Merge several models of one shape into one, tensor by tensor."""
    from .checkpoint.merge import load_merge
    from .checkpoint.merge import merge as merge_models

    report = merge_models(
        load_merge(config), destination, to=to, max_shard_size=max_shard_size, seed=seed, workers=workers
    )
    typer.echo(f"{destination}: {_written(report)}")


def _written(report: Report) -> str:
    seconds = report.write_seconds + report.verify_seconds
    return (
        f"{report.tensors} tensors, {report.parameters:,} parameters, {report.files} files in {seconds:.1f} s, "
        f"{report.tensor_bytes / max(report.write_seconds, 1e-9) / 1e9:.2f} GB/s written"
        f"{f', {report.resumed} files were there already' if report.resumed else ''}"
        f"{', read back bit-equal' if report.verified else ''}"
    )


@app.command()
def score(
    model: Annotated[Path, typer.Argument(help="A Hugging Face directory of a reward model.")],
    data: Annotated[Path, typer.Argument(help="Conversations, in any format that training reads.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The JSONL to write.")],
    tokens_per_pack: Annotated[int, typer.Option(min=2, help="No conversation may be longer.")] = 4096,
    dtype: Annotated[Literal["bf16", "fp32"], typer.Option(help="Precision.")] = "bf16",
    chat_template: Annotated[
        str, typer.Option(help="tokenizer, one of ours, or a jinja file.")
    ] = "tokenizer",
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel degree; with pp, under torchrun.")] = 1,
    pp: Annotated[int, typer.Option(min=1, help="Pipeline-parallel degree.")] = 1,
) -> None:
    """Write the reward of each conversation of a file, as {"line", "reward"}.

    One process by itself; for a model that needs several, `torchrun … -m paralign.engine.cli score …`.
    """
    from .parallel.layout import LayoutConfig
    from .processes.launch import rank_environment
    from .run.score_file import score_file

    env = rank_environment()
    layout = LayoutConfig.model_validate(
        {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
    )
    n = score_file(
        model,
        data,
        output,
        layout=layout,
        env=env,
        dtype=dtype,
        tokens_per_pack=tokens_per_pack,
        chat_template=chat_template,  # type: ignore[arg-type]
    )
    if env.rank == 0:
        typer.echo(f"{output}: rewards of {n:,} conversations")


@app.command()
def plot(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Directories of runs.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The picture to write.")],
) -> None:
    """Draw the loss curves of runs."""
    from .observe.plot import plot_runs

    plot_runs(runs, output)
    typer.echo(f"wrote {output}")


@data_app.command("inspect")
def inspect_data(
    recipe: RecipePath,
    overrides: Overrides = None,
    samples: Annotated[int, typer.Option(min=1, help="Samples to show of each source.")] = 2,
    set_name: Annotated[str, typer.Option("--set", help="train, or validation/NAME.")] = "train",
    line: Annotated[int, typer.Option(min=1, help="Begin at this line of each file, or row.")] = 1,
) -> None:
    """Show samples as the model sees them, with what is learned token by token."""
    from .data.inspect import inspect_set
    from .objectives import build_objective
    from .run.recipe import load

    loaded = load(recipe, overrides or ())
    console = Console(highlight=False, soft_wrap=True)
    for block in inspect_set(
        loaded.data,
        set_name,
        loaded.tokenizer_dir,
        n_samples=samples,
        first_line=line,
        coloured=console.is_terminal,
        kind=build_objective(loaded.objective).reads,
    ):
        console.print(block)


@data_app.command("pack")
def pack_data(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Tokenise and pack the data of a recipe, and print what came of it."""
    from .data.statistics import set_statistics
    from .run.check import open_set
    from .run.recipe import load

    loaded = load(recipe, overrides or ())
    console = Console(highlight=False, soft_wrap=True)
    for name, sources in loaded.data.sets.items():
        cache = open_set(loaded, sources, progress=True)
        batch = loaded.train.global_batch_size
        console.print(set_statistics(name, cache, global_batch_size=batch, seed=loaded.train.seed))


@kernels_app.callback(invoke_without_command=True)
def list_kernels(
    context: typer.Context,
    required: Annotated[bool, typer.Option("--required", help="Fail where torch runs instead.")] = False,
) -> None:
    """List the fused operations, what runs them here, and whether it agrees with their definition."""
    if context.invoked_subcommand is not None:
        return
    import torch
    from rich.table import Table

    from .kernels.library import find_library
    from .kernels.report import report

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = report(device)
    table = Table("operation", "runs here", "self-check", box=None)
    for row in rows:
        verdict = f"{'agrees' if row.agrees else 'DIFFERS'}, {row.error:.0e}"
        table.add_row(row.name, row.implementation, verdict)
    found = find_library()
    built = ", ".join(found.architectures) if found.architectures else "none"
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    console.print(
        f"device {device.type}; architectures built: {built}" + (f"; {found.reason}" * bool(found.reason))
    )
    if not all(row.agrees for row in rows) or (required and found.library is None):
        raise typer.Exit(1)


@kernels_app.command("build")
def build_kernels(
    arch: Annotated[
        list[str] | None, typer.Option(help="Such as sm_90; may be repeated, oldest first. Default: all.")
    ] = None,
) -> None:
    """Compile the fused operations with nvcc, into the installed package."""
    from .kernels.build import ARCHITECTURES, build

    path = build(architectures=arch or ARCHITECTURES, progress=typer.echo)
    typer.echo(f"wrote {path}")


def _gpus() -> int | None:
    import torch

    return torch.cuda.device_count() or None


if __name__ == "__main__":
    main()
