"""Objectives: their values are the formulas', their gradients still point uphill where float32 sees certainty."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from redan.attacks.objectives import (
    OBJECTIVES,
    Objective,
    cross_entropy,
    cw_margin,
    dlr,
    find_objective,
    kl_divergence,
    misclassified,
)
from redan.errors import UserError

Array = NDArray[np.float64]
SEEDS = st.integers(0, 2**32)


def logits_and_labels(seed: int, n: int = 20, classes: int = 6, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    return (
        scale * torch.randn(n, classes, generator=draws),
        torch.randint(classes, (n,), generator=draws),
    )


def log_softmax(z: Array) -> Array:
    z = z - z.max(1, keepdims=True)
    shifted: Array = z - np.log(np.exp(z).sum(1, keepdims=True))
    return shifted


def margin(z: Array, y: NDArray[np.int64]) -> Array:
    return np.array([max(np.delete(row, k)) - row[k] for row, k in zip(z, y, strict=True)])


@given(seed=SEEDS, classes=st.integers(2, 12), scale=st.sampled_from([0.0, 0.1, 3.0, 50.0]))
@settings(deadline=None, max_examples=60)
def test_cross_entropy_is_the_formula(seed: int, classes: int, scale: float) -> None:
    logits, labels = logits_and_labels(seed, classes=classes, scale=scale)
    z, y = logits.double().numpy(), labels.numpy()
    values = cross_entropy(logits, labels)
    assert values.dtype == torch.float32
    np.testing.assert_allclose(values, -log_softmax(z)[np.arange(len(y)), y], rtol=1e-5, atol=1e-15)


@given(seed=SEEDS, classes=st.integers(2, 12))
@settings(deadline=None, max_examples=60)
def test_margin_is_the_formula(seed: int, classes: int) -> None:
    logits, labels = logits_and_labels(seed, classes=classes)
    expected = margin(logits.double().numpy(), labels.numpy())
    np.testing.assert_allclose(cw_margin(logits, labels), expected, rtol=1e-5, atol=1e-6)


@given(seed=SEEDS, classes=st.integers(3, 12))
@settings(deadline=None, max_examples=60)
def test_dlr_is_the_formula(seed: int, classes: int) -> None:
    logits, labels = logits_and_labels(seed, classes=classes)
    z, y = logits.double().numpy(), labels.numpy()
    ordered = -np.sort(-z, axis=1)
    expected = margin(z, y) / (ordered[:, 0] - ordered[:, 2])
    np.testing.assert_allclose(dlr(logits, labels), expected, rtol=1e-4, atol=1e-5)


@given(seed=SEEDS, classes=st.integers(2, 12), scale=st.sampled_from([0.1, 3.0, 20.0]))
@settings(deadline=None, max_examples=60)
def test_kl_is_the_formula(seed: int, classes: int, scale: float) -> None:
    clean, _ = logits_and_labels(seed, classes=classes, scale=scale)
    logits, _ = logits_and_labels(seed + 1, classes=classes, scale=scale)
    log_p, log_q = log_softmax(clean.double().numpy()), log_softmax(logits.double().numpy())
    values = kl_divergence(logits, clean)
    assert values.dtype == torch.float32
    np.testing.assert_allclose(values, (np.exp(log_p) * (log_p - log_q)).sum(1), rtol=1e-5, atol=1e-12)


def test_kl_is_least_and_flat_at_the_clean_logits() -> None:
    clean, _ = logits_and_labels(0)
    here = clean.clone().requires_grad_()
    kl_divergence(here, clean).sum().backward()
    assert here.grad is not None
    assert here.grad.abs().max() < 1e-6
    assert kl_divergence(clean, clean).abs().max() < 1e-12
    elsewhere, _ = logits_and_labels(1)
    assert (kl_divergence(elsewhere, clean) > 1e-3).all()


@given(seed=SEEDS, scale=st.floats(0.1, 1000), shift=st.floats(-50, 50))
@settings(deadline=None, max_examples=60)
def test_dlr_is_blind_to_shift_and_scale(seed: int, scale: float, shift: float) -> None:
    logits, labels = logits_and_labels(seed)
    moved = (logits.double() * scale + shift).to(torch.float64)
    torch.testing.assert_close(dlr(moved, labels), dlr(logits.double(), labels), rtol=1e-6, atol=1e-9)


def test_dlr_needs_three_classes() -> None:
    with pytest.raises(UserError, match="at least 3 classes; use the margin objective 'cw'"):
        dlr(torch.randn(4, 2), torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize("objective", [cw_margin, dlr], ids=lambda objective: objective.name)
def test_margins_are_positive_exactly_where_misclassified(objective: Objective) -> None:
    logits, labels = logits_and_labels(1, n=500)
    wrong = misclassified(logits, labels)
    assert 0 < wrong.sum() < 500
    assert torch.equal(objective(logits, labels) > 0, wrong)


def test_logits_that_are_not_finite_predict_nothing() -> None:
    logits = torch.tensor([[2.0, 1.0], [1.0, 2.0], [torch.nan, 1.0], [torch.inf, 1.0], [2.0, -torch.inf]])
    labels = torch.tensor([0, 0, 0, 0, 0])
    assert misclassified(logits, labels).tolist() == [False, True, True, True, True]


@pytest.mark.parametrize("certainty", [5.0, 20.0, 60.0])
def test_cross_entropy_has_its_whole_gradient_on_confident_networks(certainty: float) -> None:
    # d CE / d z_k = p_k for k != y and -(sum of these) for y; float32 rounds 1 - p_y to 0 from a margin of 17 on.
    logits = torch.tensor([[certainty, 0.0, -1.0]], requires_grad=True)
    cross_entropy(logits, torch.tensor([0])).sum().backward()
    assert logits.grad is not None
    others = np.exp(log_softmax(logits.detach().double().numpy()))[0, 1:]
    np.testing.assert_allclose(logits.grad[0], [-others.sum(), *others], rtol=1e-5)


def test_kl_has_its_whole_gradient_on_confident_networks() -> None:
    # d KL / d z = q - p; with both true probabilities 1 - 1e-10 or so, float32 sees no difference.
    clean = torch.tensor([[23.0, 0.0, 0.0]])
    logits = torch.tensor([[23.0, 1.0, 0.0]], requires_grad=True)
    kl_divergence(logits, clean).sum().backward()
    assert logits.grad is not None
    p, q = (np.exp(log_softmax(z.detach().double().numpy())) for z in (clean, logits))
    np.testing.assert_allclose(logits.grad, q - p, rtol=1e-4, atol=1e-18)
    assert logits.grad[0, 0] < 0


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_are_found_by_name(name: str) -> None:
    assert find_objective(name).name == name


def test_an_unknown_objective_is_said_with_the_nearest() -> None:
    with pytest.raises(UserError, match="no objective 'drl'; did you mean 'dlr'"):
        find_objective("drl")
