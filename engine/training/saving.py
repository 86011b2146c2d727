"""One save on its way to the disk: every rank writes its file, itself or in a child, and all agree on how it went."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from enum import IntEnum
from pathlib import Path
from typing import Any

from paralign.models.errors import CheckpointError
from paralign.models.mcore import AsyncRequest, staged, write_bucket

from ..checkpoint.file_manifest import digest_file
from ..checkpoint.manifest import FileDigest
from ..files.refused import refusal
from ..parallel.mesh import Mesh
from ..processes.child import Child, ChildDied, InThread

_POLL_SECONDS = 0.01

Written = tuple[dict[int, Any], dict[str, FileDigest]]


class _State(IntEnum):
    """How far a rank is; the highest of all ranks decides."""

    WRITTEN = 0
    WRITING = 1
    FAILED = 2


class Save:
    """What megatron-core planned for one checkpoint, being written since this was made.

    Args:
        request: megatron-core's plan: what this rank writes, and what follows when all ranks have written.
        in_child: write in a child, which has the state as it is now, while this process goes on; else in a thread,
            while this process waits.
        moved: called while what this rank writes grows, for whoever watches for stalls.
    """

    def __init__(
        self, request: AsyncRequest, mesh: Mesh, *, in_child: bool, moved: Callable[[], None]
    ) -> None:
        self._request = request
        self._mesh = mesh
        self._moved = moved
        self._written: Written = {}, {}
        self._failure = ""
        self._writer: Child[Written] | InThread[Written] | None = None
        self._paths: list[str] = []
        self._held: list[Any] = []  # to the end: memory that is pinned may be shared with the child
        if request.async_fn is None:  # nothing here that no other rank writes
            return
        self._held = buckets = staged(request)
        transforms, _ = request.async_fn.args
        self._paths = [path for path, _, _ in buckets]

        def write() -> Written:
            results = {i: write_bucket(transforms, i, bucket) for i, bucket in enumerate(buckets)}
            return results, {name: digest_file(Path(path)) for path, name, _ in buckets}

        self._writer = Child(write) if in_child else InThread(write)

    def completed(self, *, wait: bool) -> Mapping[str, FileDigest] | None:
        """The digests of the files of all ranks once all have written, else None. Collective.

        Raises:
            CheckpointError: a rank could not; all of them say which, and why. What others still write is given up.
        """
        size = 0
        while (worst := _State(int(self._mesh.largest(self._state())))) is _State.WRITING:
            if not wait:
                return None
            time.sleep(_POLL_SECONDS)
            if (now := self._size()) > size:
                size = now
                self._moved()
        if worst is _State.FAILED and self._writer is not None:
            self._writer.kill()
        said = self._mesh.gather((self._failure, self._written[1]))
        if failures := [f"rank {rank}: {failure}" for rank, (failure, _) in enumerate(said) if failure]:
            raise CheckpointError("; ".join(failures[:4]))
        if self._request.async_fn is not None:
            self._request.async_fn_args[2].put(self._written[0])
        for finalize in self._request.finalize_fns:
            finalize()
        return {name: digest for _, digests in said for name, digest in digests.items()}

    def _state(self) -> _State:
        if self._writer is not None:
            if self._writer.running():
                return _State.WRITING
            self._note(self._writer.result)
            self._writer = None
        return _State.FAILED if self._failure else _State.WRITTEN

    def _size(self) -> int:
        return sum(os.path.getsize(path) for path in self._paths if os.path.exists(path))

    def _note(self, outcome: Callable[[], Written]) -> None:
        try:
            self._written = outcome()
        except ChildDied as death:
            self._failure = (
                f"its writer was {death.reason}; give the host more memory, or set async_save: false"
            )
        except OSError as error:
            self._failure = refusal(error, Path(self._paths[0]))
        except Exception as error:  # torch's writer wraps what the disk said
            self._failure = repr(error)
