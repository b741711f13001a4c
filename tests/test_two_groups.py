"""The toy of two groups: what it is built to show, and that its adversary is exact."""

import importlib.util
import json
import runpy
import sys
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[1] / "examples" / "two_groups.py"
spec = importlib.util.spec_from_file_location("two_groups", SCRIPT)
assert spec is not None and spec.loader is not None
toy = importlib.util.module_from_spec(spec)
spec.loader.exec_module(toy)


def test_hard_examples_grow_far_harder_than_easy_ones() -> None:
    rows = toy.study()
    assert [row["radius"] for row in rows] == [0.0, 0.1, 0.2, 0.3, 0.4]
    assert all(row["easy"] < row["hard"] for row in rows)
    for group in ("easy", "hard"):
        assert all(before[group] < after[group] for before, after in pairwise(rows))
    growth = {group: rows[-1][group] - rows[0][group] for group in ("easy", "hard")}
    assert growth["hard"] > 10 * growth["easy"] > 0
    # Beyond their mean of 0.25 the weak features are worth nothing: all weight moves to the robust one.
    assert rows[0]["weak_weights"] > 10 * rows[0]["robust_weight"]
    assert rows[-1]["weak_weights"] < 0.1 * rows[-1]["robust_weight"]


@pytest.mark.parametrize("radius", [0.0, 0.3])
def test_no_corner_of_the_ball_is_worse_than_the_exact_adversary(radius: float) -> None:
    rng = np.random.default_rng(0)
    weights, features, labels = rng.normal(size=6), rng.normal(size=(10, 6)), rng.choice([-1.0, 1.0], 10)
    corners = radius * np.array(list(product([-1, 1], repeat=6)))
    worst = (labels[:, None] * ((features[:, None] + corners) @ weights)).min(1)
    np.testing.assert_allclose(toy.adversarial_margins(weights, features, labels, radius), worst)
    losses = toy.adversarial_losses(weights, features, labels, radius)
    np.testing.assert_allclose(losses, np.log(1 + np.exp(-worst)))


def test_training_finds_the_minimum() -> None:
    features, labels, _ = toy.draw(500, seed=3)
    weights = toy.train(features, labels, 0.1)
    least = toy.adversarial_losses(weights, features, labels, 0.1).mean()
    rng = np.random.default_rng(1)
    for _ in range(50):
        other = weights + 0.05 * rng.normal(size=weights.shape)
        assert toy.adversarial_losses(other, features, labels, 0.1).mean() > least


def test_hard_examples_lack_the_robust_feature() -> None:
    features, labels, hard = toy.draw(20_000, seed=0)
    signed = labels[:, None] * features
    assert hard.mean() == pytest.approx(0.2, abs=0.01)
    assert signed[hard, 0].mean() == pytest.approx(0, abs=0.02)
    assert signed[~hard, 0].mean() == pytest.approx(1.5, abs=0.02)
    assert signed[:, 0].std() == pytest.approx((0.3**2 + 0.2 * 0.8 * 1.5**2) ** 0.5, rel=0.02)
    assert signed[:, 1:].mean() == pytest.approx(0.25, abs=0.005) and signed[:, 1:].std() == pytest.approx(1, rel=0.01)


def test_the_script_prints_a_table_or_one_document(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = []
    for options in ([], ["--json"]):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *options])
        runpy.run_path(str(SCRIPT), run_name="__main__")
        shown.append(capsys.readouterr().out)
    lines = [line.split() for line in shown[0].splitlines()]
    document = json.loads(shown[1])
    assert lines[0] == list(document[0]) and len(lines) == 6
    assert float(lines[5][2]) == pytest.approx(document[4]["hard"], abs=5e-4)
