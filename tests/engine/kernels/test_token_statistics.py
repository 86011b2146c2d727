"""The vocabulary-parallel head on one rank: definition, derivatives, chunks, bad input, where gradients go."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from paralign.engine.kernels.token_logprob import (
    TokenStatistics,
    TopK,
    token_logprob,
    token_statistics,
    token_statistics_ref,
)

ROWS, HIDDEN, VOCABULARY, K = 5, 8, 11, 4


def make(dtype: torch.dtype = torch.float64, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor, TopK]:
    generator = torch.Generator().manual_seed(0)
    hidden = (torch.randn(ROWS, HIDDEN, generator=generator, dtype=dtype) * scale).requires_grad_()
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=dtype).requires_grad_()
    labels = torch.randint(0, VOCABULARY, (ROWS,), generator=generator)
    indices = torch.stack([torch.randperm(VOCABULARY, generator=generator)[:K] for _ in range(ROWS)])
    return hidden, weight, labels, TopK(indices, torch.randn(ROWS, K, generator=generator, dtype=dtype))


@pytest.mark.parametrize(
    "workspace_bytes", [2**20, 2 * VOCABULARY * 8, 1], ids=["whole", "chunks", "row by row"]
)
def test_equals_its_definition_and_derivatives(workspace_bytes: int) -> None:
    hidden, weight, labels, reference = make()

    def operation(hidden: Tensor, weight: Tensor) -> TokenStatistics:
        return token_statistics(
            hidden,
            weight,
            labels,
            vocab_size=VOCABULARY,
            reference=reference,
            workspace_bytes=workspace_bytes,
        )

    torch.testing.assert_close(
        tuple(operation(hidden, weight)), tuple(token_statistics_ref(hidden, weight, labels, reference))
    )
    assert torch.autograd.gradcheck(operation, (hidden, weight))


def test_without_a_reference_there_is_no_divergence() -> None:
    hidden, weight, labels, _ = make()
    statistics = token_statistics(hidden, weight, labels, vocab_size=VOCABULARY)
    assert statistics.divergence_R is None
    torch.testing.assert_close(
        statistics.logprob_R, token_logprob(hidden, weight, labels, vocab_size=VOCABULARY)
    )


def test_divergence_from_itself_is_zero_and_never_negative() -> None:
    hidden, weight, labels, reference = make()
    logprobs = (hidden @ weight.t()).log_softmax(-1).detach()
    own = TopK(reference.indices_RK, logprobs.gather(1, reference.indices_RK))
    statistics = token_statistics(hidden, weight, labels, vocab_size=VOCABULARY, reference=own)
    assert statistics.divergence_R is not None
    torch.testing.assert_close(
        statistics.divergence_R, torch.zeros(ROWS, dtype=torch.float64), rtol=0, atol=1e-12
    )
    other = token_statistics(hidden, weight, labels, vocab_size=VOCABULARY, reference=reference)
    assert other.divergence_R is not None
    assert (other.divergence_R > 0).all()


@pytest.mark.parametrize("scale", [1e4, 1e-6])
def test_huge_and_tiny_logits(scale: float) -> None:
    hidden, weight, labels, reference = make(torch.float32, scale)
    actual = token_statistics(hidden, weight, labels, vocab_size=VOCABULARY, reference=reference)
    exact = token_statistics_ref(
        hidden.double(), weight.double(), labels, TopK(reference.indices_RK, reference.logprobs_RK.double())
    )
    for x, y in zip(actual, exact, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-6 * max(1.0, scale))
    sum(x.sum() for x in actual).backward()
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()


def test_padding_of_the_vocabulary_has_no_probability() -> None:
    hidden, weight, labels, reference = make()
    padded = torch.cat((weight.detach(), torch.full((3, HIDDEN), 50.0))).requires_grad_()
    actual = token_statistics(hidden, padded, labels, vocab_size=VOCABULARY, reference=reference)
    torch.testing.assert_close(tuple(actual), tuple(token_statistics_ref(hidden, weight, labels, reference)))
    actual.logprob_R.sum().backward()
    assert padded.grad is not None
    assert not padded.grad[VOCABULARY:].any()


def test_no_row_still_gives_every_parameter_a_gradient() -> None:
    _, weight, _, _ = make()
    hidden = torch.empty(0, HIDDEN, dtype=torch.float64, requires_grad=True)
    token_logprob(hidden, weight, torch.empty(0, dtype=torch.int64), vocab_size=VOCABULARY).sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()


def test_a_second_backward_pass_gives_the_same() -> None:
    """The first one writes the gradient over the logits it had kept."""
    hidden, weight, labels, _ = make()
    total = token_logprob(hidden, weight, labels, vocab_size=VOCABULARY).sum()
    first = torch.autograd.grad(total, (hidden, weight), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(total, (hidden, weight)), first)


@pytest.mark.parametrize("also_elsewhere", [False, True])
def test_the_weights_gradient_goes_to_main_grad(also_elsewhere: bool) -> None:
    """`zero_out_wgrad` is Megatron's mark of a weight that the embedding adds to as well."""
    hidden, weight, labels, _ = make(torch.float32)
    token_logprob(hidden, weight, labels, vocab_size=VOCABULARY).sum().backward()
    expected, weight.grad = weight.grad, None
    weight.main_grad = torch.ones(VOCABULARY, HIDDEN)  # type: ignore[attr-defined]
    weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    weight.zero_out_wgrad = also_elsewhere  # type: ignore[attr-defined]
    token_logprob(hidden, weight, labels, vocab_size=VOCABULARY).sum().backward()
    torch.testing.assert_close(weight.main_grad, expected + 1)  # type: ignore[attr-defined]
    assert weight.grad_added_to_main_grad  # type: ignore[attr-defined]
    assert weight.grad is not None  # data parallelism waits for one
    assert not also_elsewhere or not weight.grad.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"labels_R": torch.tensor([0, 1, 11, 0, 0])},
            "the label 11 in row 2 is outside the vocabulary of 11",
        ),
        ({"labels_R": torch.tensor([0, -100, 1, 0, 0])}, "the label -100 in row 1"),
        ({"labels_R": torch.zeros(5)}, r"int64 labels \(R,\); got"),
        ({"hidden_RH": torch.zeros(5, 7, dtype=torch.float64)}, r"hidden \(R, H\).*shape \(5, 7\)"),
        (
            {"reference": TopK(torch.full((5, 4), 11), torch.zeros(5, 4))},
            "a chosen index 11 in row 0 is outside the vocabulary",
        ),
        ({"reference": TopK(torch.zeros(5, 12).long(), torch.zeros(5, 12))}, "0 < K ≤ 11, the vocabulary"),
        ({"reference": TopK(torch.zeros(4, 2).long(), torch.zeros(4, 2))}, r"\(R, K\)"),
    ],
)
def test_bad_input(change: dict, message: str) -> None:
    hidden, weight, labels, reference = make()
    arguments = {
        "hidden_RH": hidden,
        "weight_VH": weight,
        "labels_R": labels,
        "reference": reference,
    } | change
    with pytest.raises(ValueError, match=message):
        token_statistics(**arguments, vocab_size=VOCABULARY)
