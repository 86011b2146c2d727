"""Where the ranks of one attempt meet: a part of torchrun's store that holds nothing of the attempts before.

torchrun lets its ranks use the store by which its agents meet, and keeps it over restarts: what ranks that are gone
have said is still there, their addresses among it. Nothing in a rank's environment names the attempt on all machines
alike (TORCHELASTIC_RESTART_COUNT is each agent's own count). So rank 0 draws a name and tells it to each rank that
asks. A rank asks with a word of its own that no earlier attempt has used, so that no old answer can be meant.
"""

from __future__ import annotations

import time
import uuid
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from paralign.models.errors import TrainingError

_POLL_SECONDS = 0.01


def of_this_attempt(store: Any, rank: int, world_size: int, timeout: timedelta) -> Any:
    """The part of `store` that these ranks alone use. Collective.

    Raises:
        TrainingError: the others have not come in time.
    """
    if rank:
        word = uuid.uuid4().hex
        store.set(f"paralign/rank {rank} asks", word)
        try:
            store.wait([f"paralign/{word}"], timeout)
        except dist.DistStoreError:
            raise TrainingError(
                f"rank {rank}: rank 0 has not come within {timeout}; is its node up?"
            ) from None
        attempt = store.get(f"paralign/{word}").decode()
        store.set(f"paralign/{attempt}/{rank}", "")
        return dist.PrefixStore(f"paralign/{attempt}", store)
    attempt = uuid.uuid4().hex
    deadline = time.monotonic() + timeout.total_seconds()
    answered: dict[int, str] = {}
    absent = set(range(1, world_size))
    while absent:
        for rank in sorted(absent):
            asks = f"paralign/rank {rank} asks"
            if store.check([asks]) and (word := store.get(asks).decode()) != answered.get(rank):
                store.set(f"paralign/{word}", attempt)
                answered[rank] = word
        absent = {rank for rank in absent if not store.check([f"paralign/{attempt}/{rank}"])}
        if absent and time.monotonic() > deadline:
            raise TrainingError(f"rank {min(absent)} has not come within {timeout}; is its node up?")
        time.sleep(_POLL_SECONDS)
    return dist.PrefixStore(f"paralign/{attempt}", store)
