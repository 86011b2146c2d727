"""Shows samples of a recipe's data with their loss mask, token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from rich.text import Text

from paralign.models.errors import DataError

from ..batch import Kind
from .config import DataConfig
from .encode import encode_record
from .render import Rendered, Renderer, template_text
from .sources import read_records, record_format

# Two shades in turn, so that each token is seen; black on green is learned.
LEARNED, CONTEXT = ("black on green", "black on bright_green"), ("", "dim")
ANSWERS = {Kind.CONVERSATIONS: [""], Kind.PAIRS: [", chosen", ", rejected"], Kind.LABELLED: [""]}
LEGEND = {
    True: "what is learned stands on green, shades change from token to token",
    False: "each token that is learned stands in ⟦ ⟧",
}


def inspect_set(
    config: DataConfig,
    set_name: str,
    tokenizer_dir: Path,
    *,
    n_samples: int,
    first_line: int = 1,
    coloured: bool,
    kind: Kind = Kind.CONVERSATIONS,
) -> Iterator[Text]:
    """A legend, then a block for each of the first samples of each source. No cache is read or built.

    A record that cannot be used is shown as its error.

    Args:
        first_line: samples that begin at an earlier line, or row, are passed over.
        coloured: mark what is learned by colour, for a terminal; else by brackets.
        kind: what records are read as; of a preference each answer is shown behind its prompt.

    Raises:
        DataError: no such set; a source, tokenizer or template that cannot be read at all.
    """
    if set_name not in config.sets:
        raise DataError(f"data: no set {set_name}; this recipe has {', '.join(config.sets)}")
    renderer = Renderer(tokenizer_dir, template_text(config.chat_template), config.loss_on)
    yield Text(LEGEND[coloured] + "\n")
    for source in config.sets[set_name]:
        source = source.model_copy(update={"format": source.format or config.format})
        reading = record_format(source, kind)
        found = reading.value if isinstance(reading, Kind) else reading
        records = (record for record in read_records(source.path) if record.line >= first_line)
        for record in islice(records, n_samples):
            place = f"{source.path}:{record.line}"
            try:
                samples, _ = encode_record(record, source, reading, renderer)
            except DataError as error:
                yield Text(f"── {source.name} ({found})\n{error}\n", style="red" if coloured else "")
                continue
            names = ANSWERS[kind] if len(samples) == len(ANSWERS[kind]) else _parts(len(samples))
            for sample, answer in zip(samples, names, strict=True):
                yield (
                    Text(f"── {source.name} ({found}{answer})  {place}  {_facts(sample, config, renderer)}\n")
                    .append(_masked(renderer.pieces(sample), coloured=coloured))
                    .append("\n")
                )


def _parts(n: int) -> list[str]:
    """Of a conversation that is several samples."""
    return [f", part {i + 1} of {n}" for i in range(n)]


def _facts(sample: Rendered, config: DataConfig, renderer: Renderer) -> str:
    """Numbers of a sample, and what is wrong with it."""
    n_learned = int(sample.learned.sum())
    facts = [f"{len(sample.tokens):,} tokens, {n_learned:,} learned"]
    if not n_learned:
        facts.append("nothing to learn")
    elif not renderer.learns_to_stop(sample):
        facts.append("no stop token is learned")
    if len(sample.tokens) > config.tokens_per_pack:
        facts.append(f"longer than a pack of {config.tokens_per_pack:,}")
    return "; ".join(facts)


def _masked(pieces: Sequence[tuple[str, bool]], *, coloured: bool) -> Text:
    shown = Text()
    for i, (piece, learned) in enumerate(pieces):
        piece = piece.replace("\n", "⏎\n")
        if coloured:
            shown.append(piece, style=(LEARNED if learned else CONTEXT)[i % 2])
        else:
            shown.append(f"⟦{piece}⟧" if learned else piece)
    return shown
