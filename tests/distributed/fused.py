"""A row of the layout certificate with every fused operation on; on the CPU their references."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from unittest import mock

from paralign.engine.backends import ours
from paralign.engine.kernels.head import read_head
from paralign.engine.training.optim import Optimizer

from . import certificate
from .certificate import Case, Row, certify

# Logits of a few rows at a time, so that the head makes its gradients in the forward pass.
FUSED_IN_CHUNKS = replace(ours.FUSED, read_head=partial(read_head, workspace_bytes=2**13))


def certify_fused(rank: int, world_size: int, case: Case) -> Row:
    with (
        mock.patch.object(ours, "TORCH", FUSED_IN_CHUNKS),
        mock.patch.object(certificate, "Optimizer", partial(Optimizer, fused=True)),
    ):
        return certify(rank, world_size, case)
