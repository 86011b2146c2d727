"""The vocabulary-parallel head on one rank: definition, derivatives, chunks, bad input, where gradients go."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from paralign.engine.kernels import token_statistics as head
from paralign.engine.kernels.token_statistics import TokenStatistics, token_statistics, token_statistics_ref
from paralign.models.head_read import TopK

ROWS, HIDDEN, VOCABULARY, K = 5, 8, 11, 4


def make(
    dtype: torch.dtype = torch.float64, scale: float = 1.0, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor, Tensor, TopK]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, HIDDEN, generator=generator, dtype=dtype) * scale
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=dtype)
    labels = torch.randint(0, VOCABULARY, (ROWS,), generator=generator)
    indices = torch.stack([torch.randperm(VOCABULARY, generator=generator)[:K] for _ in range(ROWS)])
    logprobs = torch.randn(ROWS, K, generator=generator, dtype=dtype)
    leaves = hidden.to(device).requires_grad_(), weight.to(device).requires_grad_()
    return *leaves, labels.to(device), TopK(indices.to(device), logprobs.to(device))


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
    assert torch.autograd.gradcheck(lambda h, w: operation(h, w)[:3], (hidden, weight))


def test_without_a_reference_there_is_no_divergence() -> None:
    hidden, weight, labels, _ = make()
    statistics = token_statistics(hidden, weight, labels, vocab_size=VOCABULARY)
    assert statistics.divergence_R is None
    torch.testing.assert_close(
        statistics.logprob_R, token_statistics(hidden, weight, labels, vocab_size=VOCABULARY).logprob_R
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
def test_huge_and_tiny_logits(scale: float, device: torch.device) -> None:
    hidden, weight, labels, reference = make(torch.float32, scale, device)
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


def test_no_row_still_gives_every_parameter_a_gradient(device: torch.device) -> None:
    _, weight, labels, _ = make(torch.float32, device=device)
    hidden = torch.empty(0, HIDDEN, device=device, requires_grad=True)
    nothing = torch.empty(0, device=device)
    token_statistics(
        hidden, weight, labels[:0], vocab_size=VOCABULARY, row_gradient=nothing
    ).logprob_R.sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()


def test_a_second_backward_pass_gives_the_same(device: torch.device) -> None:
    """The first one writes the gradient over the logits it had kept."""
    hidden, weight, labels, _ = make(torch.float32, device=device)
    total = token_statistics(hidden, weight, labels, vocab_size=VOCABULARY).logprob_R.sum()
    first = torch.autograd.grad(total, (hidden, weight), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(total, (hidden, weight)), first)


@pytest.mark.parametrize("also_elsewhere", [False, True])
def test_the_weights_gradient_goes_to_main_grad(also_elsewhere: bool, device: torch.device) -> None:
    """`zero_out_wgrad` is Megatron's mark of a weight that the embedding adds to as well."""
    hidden, weight, labels, _ = make(torch.float32, device=device)
    token_statistics(hidden, weight, labels, vocab_size=VOCABULARY).logprob_R.sum().backward()
    expected, weight.grad = weight.grad, None
    weight.main_grad = torch.ones_like(weight)  # type: ignore[attr-defined]
    weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    weight.zero_out_wgrad = also_elsewhere  # type: ignore[attr-defined]
    token_statistics(hidden, weight, labels, vocab_size=VOCABULARY).logprob_R.sum().backward()
    torch.testing.assert_close(weight.main_grad, expected + 1)  # type: ignore[attr-defined]
    assert weight.grad_added_to_main_grad  # type: ignore[attr-defined]
    assert weight.grad is not None  # data parallelism waits for one
    assert not also_elsewhere or not weight.grad.any()


TWO_ROWS = 2 * VOCABULARY * 8  # a workspace that holds the logits of two of the five rows


def with_main_grad(weight: Tensor) -> Tensor:
    """As Megatron's data parallelism leaves a parameter."""
    weight.main_grad = torch.zeros_like(weight)  # type: ignore[attr-defined]
    weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    return weight


@contextmanager
def counting_products() -> Iterator[list[Tensor]]:
    """Matrix products of the vocabulary's size while it is open."""
    seen: list[Tensor] = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):  # type: ignore[no-untyped-def]
            result = function(*arguments, **(options or {}))
            if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm_.default):
                seen.append(result)
            return result

    with Mode():
        yield seen


@pytest.mark.parametrize(
    ("known", "workspace_bytes", "products"),
    [(False, 2**20, 3), (False, TWO_ROWS, 4 * 3), (True, TWO_ROWS, 3 * 3), (True, 1, 3 * 5)],
    ids=["logits kept", "computed again", "gradient known", "gradient known, row by row"],
)
def test_three_products_for_each_chunk_where_logits_or_gradients_are_kept(
    known: bool, workspace_bytes: int, products: int
) -> None:
    hidden, weight, labels, _ = make()
    by_row = torch.tensor([-0.25, -0.5, -0.25, 0.0, -0.125])
    wanted = torch.autograd.grad(
        (token_statistics_ref(hidden, weight, labels).logprob_R * by_row).sum(), (hidden, weight)
    )
    weight = with_main_grad(weight)
    with counting_products() as seen:
        found = token_statistics(
            hidden,
            weight,
            labels,
            vocab_size=VOCABULARY,
            row_gradient=by_row if known else None,
            workspace_bytes=workspace_bytes,
        )
        (found.logprob_R * by_row).sum().backward()
    assert len(seen) == products
    torch.testing.assert_close(tuple(found), tuple(token_statistics_ref(hidden, weight, labels)))
    torch.testing.assert_close((hidden.grad, weight.main_grad), wanted)  # type: ignore[attr-defined]


def test_a_known_gradient_goes_unused_without_a_buffer_or_without_a_backward_pass() -> None:
    hidden, weight, labels, _ = make()
    options = {"vocab_size": VOCABULARY, "row_gradient": -torch.ones(5), "workspace_bytes": TWO_ROWS}
    (-token_statistics(hidden, weight, labels, **options).logprob_R).sum().backward()
    wanted = torch.autograd.grad(token_statistics_ref(hidden, weight, labels).logprob_R.sum(), weight)[0]
    torch.testing.assert_close(weight.grad, -wanted)
    weight = with_main_grad(weight)
    with torch.no_grad():
        token_statistics(hidden, weight, labels, **options)
    assert not weight.main_grad.any()  # type: ignore[attr-defined]


@pytest.mark.parametrize("workspace_bytes", [2**20, TWO_ROWS], ids=["whole", "chunks"])
def test_gradients_flow_through_nothing_but_what_is_known(workspace_bytes: int) -> None:
    hidden, weight, labels, reference = make()
    options = {"vocab_size": VOCABULARY, "row_gradient": -torch.ones(5), "workspace_bytes": workspace_bytes}
    for asked in ({}, {"reference": reference}):
        found = token_statistics(hidden, with_main_grad(weight), labels, **options, **asked)
        assert found.logprob_R.requires_grad
        assert not any(values.requires_grad for values in found[1:] if values is not None)


def test_another_gradient_than_the_known_one_is_an_error() -> None:
    hidden, weight, labels, _ = make()
    logprobs = token_statistics(
        hidden,
        with_main_grad(weight),
        labels,
        vocab_size=VOCABULARY,
        row_gradient=-torch.ones(5),
        workspace_bytes=TWO_ROWS,
    ).logprob_R
    with pytest.raises(
        ValueError, match=r"row_gradient was given as -1\.0, .* brought -2\.0 for row 3; give none"
    ):
        (logprobs * torch.tensor([-1.0, -1, -1, -2, -1])).sum().backward()


@pytest.mark.parametrize("known", [False, True])
def test_where_nobody_may_look_a_label_outside_ruins_its_gradient_too(
    known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on CUDA: the norm of the gradient is not finite, and the step is refused."""
    monkeypatch.setattr(head, "_outside", lambda indices, size, _: (indices < 0) | (indices >= size))
    hidden, weight, labels, _ = make()
    labels[1] = VOCABULARY
    logprobs = token_statistics(
        hidden,
        with_main_grad(weight),
        labels,
        vocab_size=VOCABULARY,
        row_gradient=torch.ones(5) if known else None,
        workspace_bytes=TWO_ROWS,
    ).logprob_R
    assert logprobs.isnan().tolist() == [False, True, False, False, False]
    logprobs.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.isnan().any(1).tolist() == [False, True, False, False, False]
    assert weight.main_grad.isnan().any()  # type: ignore[attr-defined]


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
        (
            {"hidden_RH": torch.zeros(5, 8).long(), "weight_VH": torch.zeros(11, 8).long()},
            r"token_statistics: int64 of shape \(5, 8\), stride \(8, 1\); it takes float32",
        ),
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
