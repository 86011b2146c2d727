"""What preference training is held against: transformers, one answer at a time, and TRL's own losses.

The model sees one prompt with one answer, unpacked and unshared; TRL's trainers get the log-probabilities it
gave, padded the way they expect them, and compute the loss of all pairs as one batch on one device.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paralign.engine.data.answers import Answer, Group

from .reference import tiny_model


def make_pairs(n: int = 13, *, seed: int = 5) -> list[Group]:
    """Pairs of very unequal length: prompts of 1 to 40 tokens, answers of 1 to 45; some scored, some with margins."""
    draw = np.random.default_rng(seed)
    groups = []
    for i in range(n):
        prompt = draw.integers(0, 251, 1 if i % 5 == 0 else draw.integers(2, 40))
        scored = i % 3 == 0
        answers = []
        for k in range(2):
            tokens = draw.integers(0, 251, draw.integers(1, 4) if (i + k) % 3 == 0 else draw.integers(4, 45))
            learned = np.ones(len(tokens), dtype=np.float32)
            learned[-1] = len(tokens) < 3 or i % 4 != 1  # what a template puts after the stop is not learned
            score = float(draw.uniform(-1, 1)) if scored else math.nan
            answers.append(Answer(tokens, learned, id=2 * i + k, score=score))
        groups.append(Group(prompt, tuple(answers), margin=0.25 * (i % 2)))
    return groups


def make_labelled(n: int = 12, *, seed: int = 6) -> list[Group]:
    """Prompts with one to three answers, each labelled good or bad."""
    draw = np.random.default_rng(seed)
    groups, id_ = [], 0
    for i in range(n):
        answers = []
        for _ in range((1, 1, 2, 1, 3)[i % 5]):
            tokens = draw.integers(0, 251, draw.integers(1, 30))
            answers.append(
                Answer(tokens, np.ones(len(tokens), dtype=np.float32), id=id_, desirable=id_ % 3 != 0)
            )
            id_ += 1
        groups.append(Group(draw.integers(0, 251, draw.integers(1, 30)), tuple(answers)))
    return groups


@dataclass
class PreferenceReference:
    """A model, its reference, and the loss and gradients of each objective.

    Attributes:
        config: of transformers; with the class of the language model.
        weights, reference_weights: of the policy, with those of a scalar head, and of the reference model.
        ref_logprobs: float64, by answer id, under the reference model: of pairs and of labelled answers.
        losses, gradients: by the name of the case.
    """

    config: dict[str, Any]
    weights: dict[str, Tensor]
    reference_weights: dict[str, Tensor]
    ref_logprobs: dict[str, np.ndarray]
    losses: dict[str, float]
    gradients: dict[str, dict[str, Tensor]]


class Unpacked:
    """A transformers model under the interface that TRL's trainers call, computing one sequence at a time."""

    training = True

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, **_: Any
    ) -> SimpleNamespace:
        rows = [
            logprobs_of(self.model, ids[mask.bool()], own[mask.bool()])
            for ids, mask, own in zip(input_ids, attention_mask, labels)
        ]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        nothing = torch.zeros_like(padded)
        return SimpleNamespace(log_probs=padded, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())


def logprobs_of(model: Any, ids_L: Tensor, labels_L: Tensor) -> Tensor:
    """Float64 (L−1,): log-probability of each next token, 0 where its label is −100."""
    logits = model(input_ids=ids_L[None]).logits[0, :-1].double()
    labels = labels_L[1:]
    logprob = logits.log_softmax(-1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
    return torch.where(labels == -100, 0.0, logprob)


def sequence(prompt: np.ndarray, answer: Answer) -> tuple[Tensor, Tensor]:
    """Token ids and labels of a prompt with one answer."""
    ids = torch.tensor(np.concatenate((prompt, answer.tokens)))
    labels = torch.full_like(ids, -100)
    learned = torch.tensor(answer.weights > 0)
    labels[len(prompt) :] = torch.where(learned, ids[len(prompt) :], -100)
    return ids, labels


def padded(sequences: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """TRL's batch: input_ids, attention_mask, completion_mask."""
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad([ids for ids, _ in sequences], batch_first=True),
        "attention_mask": pad([torch.ones_like(ids) for ids, _ in sequences], batch_first=True),
        "completion_mask": pad([(labels != -100).long() for _, labels in sequences], batch_first=True),
    }


def trainer(**fields: Any) -> SimpleNamespace:
    """As much of a TRL trainer as its loss reads."""
    accelerator = SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x, gather=lambda x: x)
    return SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=accelerator,
        aux_loss_enabled=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **fields,
    )


def chosen_then_rejected(pairs: Sequence[Group]) -> list[tuple[Tensor, Tensor]]:
    return [sequence(pair.prompt, pair.answers[k]) for k in (0, 1) for pair in pairs]


def dpo_loss(
    model: Any,
    pairs: Sequence[Group],
    ref: np.ndarray,
    *,
    beta: float,
    types: Sequence[str],
    weights: Sequence[float] = (1.0,),
    label_smoothing: float = 0.0,
) -> Tensor:
    from trl.trainer.dpo_trainer import DPOTrainer

    fake = trainer(
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        beta=beta,
        label_smoothing=label_smoothing,
        loss_types=list(types),
        loss_weights=list(weights),
        use_weighting=False,
    )
    inputs = padded(chosen_then_rejected(pairs))
    for name, k in (("ref_chosen_logps", 0), ("ref_rejected_logps", 1)):
        inputs[name] = torch.tensor([ref[pair.answers[k].id] for pair in pairs])
    return DPOTrainer._compute_loss(fake, Unpacked(model), inputs, False)


def per_token(model: Any, pairs: Sequence[Group]) -> tuple[Tensor, Tensor]:
    values = [
        logprobs_of(model, ids, labels).sum() / (labels[1:] != -100).sum()
        for ids, labels in chosen_then_rejected(pairs)
    ]
    return torch.stack(values[: len(pairs)]), torch.stack(values[len(pairs) :])


def simpo_loss(model: Any, pairs: Sequence[Group], *, beta: float, gamma: float) -> Tensor:
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    fake = trainer(alpha=0.0, loss_type="simpo", simpo_gamma=gamma, beta=beta, label_smoothing=0.0)
    return CPOTrainer.cpo_loss(fake, *per_token(model, pairs))[0].mean()


def cpo_loss(
    model: Any, pairs: Sequence[Group], *, beta: float, loss_type: str, label_smoothing: float, alpha: float
) -> Tensor:
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    fake = trainer(alpha=0.0, loss_type=loss_type, beta=beta, label_smoothing=label_smoothing)
    sequences = chosen_then_rejected(pairs)
    sums = torch.stack([logprobs_of(model, ids, labels).sum() for ids, labels in sequences])
    counts = torch.tensor([int((labels[1:] != -100).sum()) for _, labels in sequences])
    # As TRL's trainer calls its loss: ipo takes the mean over an answer's tokens.
    values = sums / counts if loss_type == "ipo" else sums
    losses = CPOTrainer.cpo_loss(fake, values[: len(pairs)], values[len(pairs) :])[0]
    return losses.mean() - alpha * sums[: len(pairs)].sum() / counts[: len(pairs)].sum()


def orpo_loss(model: Any, pairs: Sequence[Group], *, beta: float) -> Tensor:
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    odds = ORPOTrainer.odds_ratio_loss(trainer(beta=beta), *per_token(model, pairs))[0]
    likelihoods = [logprobs_of(model, ids, ids) for ids, _ in chosen_then_rejected(pairs)[: len(pairs)]]
    return -torch.cat(likelihoods).mean() - odds.mean()


def reward_loss(model: Any, pairs: Sequence[Group], *, alpha: float, centring: float | None) -> Tensor:
    from trl.trainer.reward_trainer import RewardTrainer

    def score(input_ids: Tensor, attention_mask: Tensor, **_: Any) -> SimpleNamespace:
        values = [
            model(input_ids=ids[mask.bool()][None]).logits[0] for ids, mask in zip(input_ids, attention_mask)
        ]
        return SimpleNamespace(logits=torch.stack(values))

    inputs = padded(chosen_then_rejected(pairs)) | {"margin": torch.tensor([pair.margin for pair in pairs])}
    fake = trainer(args=SimpleNamespace(center_rewards_coefficient=centring))
    loss, out = RewardTrainer.compute_loss(fake, score, inputs, return_outputs=True)
    rewards = out.logits[:, 0]
    scores = torch.tensor([pair.answers[k].score for k in (0, 1) for pair in pairs])
    squares = torch.where(scores.isnan(), 0.0, (rewards - scores.nan_to_num()) ** 2)
    return loss + alpha * squares.sum() / len(pairs)


def kto_loss(
    model: Any,
    groups: Sequence[Group],
    mismatched: Sequence[Group],
    ref: np.ndarray,
    ref_kl: np.ndarray,
    *,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> Tensor:
    """TRL's on one device that holds the whole step, so that its mean is the global one."""
    from trl.trainer.kto_trainer import KTOTrainer

    answers = [(group.prompt, answer) for group in groups for answer in group.answers]
    others = {answer.id: sequence(group.prompt, answer) for group in mismatched for answer in group.answers}
    ids = [answer.id for _, answer in answers]

    def kl_logps(model: Any, batch: Any) -> Tensor:
        with torch.no_grad():
            return torch.stack([logprobs_of(model.model, *others[i]).sum() for i in ids])

    fake = trainer(
        _compute_kl_logps=kl_logps,
        precompute_ref_logps=True,
        calculate_KL=True,
        loss_type="kto",
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
    )
    inputs = padded([sequence(prompt, answer) for prompt, answer in answers])
    inputs |= {
        "label": torch.tensor([answer.desirable for _, answer in answers]),
        "ref_logps": torch.tensor(ref[ids]),
        "ref_KL_logps": torch.tensor(ref_kl[ids]),
    }
    return KTOTrainer._compute_loss(fake, Unpacked(model), inputs, False)


LossOf = Callable[["Models"], Tensor]


@dataclass
class Models:
    """The policy as a language model and as a reward model, and what the reference model gave."""

    lm: Any
    scorer: Any
    pairs: Sequence[Group]
    labelled: Sequence[Group]
    ref_logprobs: Mapping[str, np.ndarray]
    reference_lm: Any


def make_preference_reference(
    family: str,
    pairs: Sequence[Group],
    labelled: Sequence[Group],
    cases: Mapping[str, LossOf],
) -> PreferenceReference:
    """Runs every case in one process, unpacked, in fp32."""
    from transformers import LlamaForSequenceClassification, Qwen2ForSequenceClassification

    lm, reference_lm = tiny_model(family, layers=4), tiny_model(family, layers=4)
    with torch.no_grad():
        torch.manual_seed(10)  # KTO's baseline is above 0 in both families, so that its floor hides nothing
        for parameter in reference_lm.parameters():
            parameter.add_(0.005 * torch.randn_like(parameter))
    scoring = {"llama": LlamaForSequenceClassification, "qwen2": Qwen2ForSequenceClassification}[family]
    scorer = scoring(type(lm.config).from_dict(lm.config.to_dict() | {"num_labels": 1}))
    scorer.model.load_state_dict(lm.model.state_dict())
    with torch.no_grad():
        scorer.score.weight.copy_(0.1 * torch.randn_like(scorer.score.weight))

    def score(groups: Sequence[Group]) -> np.ndarray:
        with torch.no_grad():
            values = [
                logprobs_of(reference_lm, *sequence(group.prompt, answer)).sum()
                for group in groups
                for answer in group.answers
            ]
        return torch.stack(values).numpy()

    models = Models(
        lm, scorer, pairs, labelled, {"pairs": score(pairs), "labelled": score(labelled)}, reference_lm
    )
    losses, gradients = {}, {}
    for name, loss_of in cases.items():
        lm.zero_grad()
        scorer.zero_grad()
        loss = loss_of(models)
        loss.backward()
        losses[name] = loss.item()
        gradients[name] = {
            key: parameter.grad.clone()
            for model in (lm, scorer)
            for key, parameter in model.named_parameters()
            if parameter.grad is not None
        }
    return PreferenceReference(
        config=lm.config.to_dict() | {"architectures": [type(lm).__name__]},
        weights={k: v.detach().clone() for k, v in (*lm.state_dict().items(), *scorer.state_dict().items())},
        reference_weights={k: v.detach().clone() for k, v in reference_lm.state_dict().items()},
        ref_logprobs=dict(models.ref_logprobs),
        losses=losses,
        gradients=gradients,
    )
