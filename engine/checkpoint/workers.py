"""Work on many tensors or files at once, and the bar that shows how far it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

Item = TypeVar("Item")
Result = TypeVar("Result")
Advance = Callable[[int], None]  # told how many bytes more are done


def over(items: Iterable[Item], work: Callable[[Item], Result], workers: int) -> list[Result]:
    """`work` of every item, in order, `workers` at a time; raises what the first to fail has raised.

    Torch computes with one thread in each: blocks are small, and the other cores have hashing and writing to do.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(workers) as pool:
            try:
                return list(pool.map(work, items))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    finally:
        torch.set_num_threads(threads)


class ByteBar(Progress):
    """A bar for each task with bytes, GB/s and the time that is left, where there is a terminal to show it."""

    def __init__(self, *, shown: bool) -> None:
        console = Console(stderr=True)
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not (shown and console.is_terminal),
        )

    def task(self, description: str, *, total: int, done: int = 0) -> Advance:
        """Adds a task; call what is returned with the bytes that are done."""
        task = self.add_task(description, total=total, completed=done)
        return lambda count: self.advance(task, count)
