"""One model that learns: gradients and metrics of a batch, and the update that follows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from paralign.models.arch import Arch

from ..batch import StepBatch
from ..config.optimizer import OptimizerConfig, learning_rate
from ..objectives import Objective
from .model import Model
from .optim import Optimizer
from .step import UNITS, report, run_step


@dataclass
class Learner:
    """A model, what it learns, and how.

    Attributes:
        model: prepared to train.
        schedule: of the learning rate, over `total_steps`.
    """

    model: Model
    objective: Objective
    optimizer: Optimizer
    schedule: OptimizerConfig
    total_steps: int

    def gradients(self, batch: StepBatch) -> dict[str, float]:
        """Forward and backward passes; the loss and the objective's metrics. Collective."""
        self.optimizer.zero_grad()
        return report(self.objective, run_step(self.model, batch, self.objective, train=True))

    def gradient_norm(self) -> float:
        """The gradients' global norm before clipping; nothing is changed by it. Collective."""
        return self.optimizer.gradient_norm()

    def learning_rate(self, step: int) -> float:
        """What step number `step` is taken with."""
        return learning_rate(self.schedule, step, self.total_steps)

    def update(self, step: int) -> None:
        """The optimizer's step with the gradients of step number `step`, whose norm was taken. Collective."""
        self.optimizer.update(self.learning_rate(step))

    def no_sums(self) -> Tensor:
        """What `measure` gives of no step at all; see `run_step`."""
        n_rows = len(UNITS) + len(self.objective.metrics)
        return torch.zeros(n_rows, 2, dtype=torch.float64, device=self.model.mesh.device)

    def measure(self, batch: StepBatch) -> Tensor:
        """Sums and counts without gradient, to be added up over steps; `report` of step.py makes numbers of them."""
        return run_step(self.model, batch, self.objective, train=False)


def training_flops(arch: Arch, batch: StepBatch) -> float:
    """Forward and backward of a step over all ranks; what recompute adds does not count as work done."""
    effective = batch.squared_lengths / max(1, batch.n_tokens)
    per_token = arch.linear_flops_per_token + arch.attention_flops_per_token(effective)
    return 3 * (batch.n_tokens * per_token + batch.n_loss * arch.head_flops_per_token)
