"""AutoAttack and its targeted and sparse parts: known optima, odd models, and what must be refused."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import Generator, Tensor, nn

import redan
from redan.attacks import APGD, FAB, PGD, Attack, AutoAttack, SearchModel, Square, TargetedAPGD, cross_entropy, dlr
from redan.attacks.apgd import wrong_classes
from redan.attacks.objectives import cw_margin, targeted_dlr, targeted_margin
from redan.errors import UserError
from redan.threats import L1, L2, Linf, LpBall


def draws(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


class Affine(nn.Module):
    """Logits ``W x + b``."""

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.weight.T + self.bias


def random_affine(classes: int, pixels: int, seed: int) -> Affine:
    generator = draws(seed)
    return Affine(torch.randn(classes, pixels, generator=generator), 0.1 * torch.randn(classes, generator=generator))


def dual_norm(threat: LpBall, w: Tensor) -> Tensor:
    return {"linf": w.abs().sum(-1), "l2": w.norm(dim=-1), "l1": w.abs().amax(-1)}[threat.norm]


@pytest.fixture(scope="module")
def net(trained: object) -> nn.Module:
    return redan.load(str(trained))


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    return torch.tensor(data.images[-60:, None] / 16, dtype=torch.float32), torch.tensor(data.target[-60:])


@pytest.mark.parametrize("classes", [2, 3, 4, 8, 10])
@pytest.mark.parametrize("norm", [Linf, L2, L1])
def test_verdict_on_a_linear_model_is_the_exact_one(norm: type[LpBall], classes: int) -> None:
    # In the middle of the box nothing clips: an image falls if and only if some margin over the dual norm is below
    # the radius.
    model = random_affine(classes, 16, seed=classes)
    model.bias -= model(torch.full((1, 1, 4, 4), 0.5))[0]
    images = 0.5 + 0.1 * (torch.rand(80, 1, 4, 4, generator=draws(1)) - 0.5)
    logits = model(images)
    labels = logits.argmax(1)
    distance = torch.full((len(images),), math.inf)
    for other in range(classes):
        margin = logits.gather(1, labels[:, None]).squeeze(1) - logits[:, other]
        reach = dual_norm(norm(1.0), model.weight[labels] - model.weight[other])
        distance = torch.where(labels == other, distance, torch.minimum(distance, margin / reach.clamp(min=1e-9)))
    threat = norm(float(distance.median()) * 1.001)
    sure = (distance - threat.radius).abs() > 0.02 * threat.radius
    falls = distance < threat.radius
    stands = torch.ones_like(falls)
    parts = AutoAttack(threat).parts(classes) | {"square": Square(threat, queries=50)}
    for attack in parts.values():
        # In float32: these margins are smaller than bfloat16 rounds the logits.
        search = SearchModel(model, precision="float32")
        found = attack(search, images[stands], labels[stands], generator=draws(2))
        broken = model(found).argmax(1) != labels[stands]
        assert threat.contains(found, images[stands]).all()
        stands[stands.clone()] = ~broken
    assert torch.equal(stands[sure], ~falls[sure])


@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.6), L1(1.5)], ids=str)
def test_the_ensemble_is_at_least_as_strong_as_each_part(
    threat: LpBall, net: nn.Module, digits: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    images, labels = digits
    monkeypatch.setattr(Square, "__init__", _few_queries(Square.__init__))
    found = AutoAttack(threat)(net, images, labels, generator=draws())
    assert threat.contains(found, images).all()
    broken = net(found).argmax(1) != labels
    for attack in (APGD(threat), TargetedAPGD(threat), PGD(threat, steps=100)):
        alone = net(attack(net, images, labels, generator=draws(1))).argmax(1) != labels
        assert broken.sum() >= alone.sum() - 1  # a start of its own may find one more
    outcome = AutoAttack(threat).run(SearchModel(net), images, labels, draws())
    assert torch.equal(outcome.images, found)
    assert outcome.calls[broken].float().mean() < outcome.calls[~broken].float().mean()


def _few_queries(honest: object):  # type: ignore[no-untyped-def]
    def init(self: Square, threat: LpBall, queries: int = 60, **options: object) -> None:
        honest(self, threat, queries, **options)  # type: ignore[operator]

    return init


def test_apgd_in_l1_beats_plain_pgd(net: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    images, labels = digits
    stands = {
        type(attack).__name__: int((net(attack(net, images, labels, generator=draws())).argmax(1) == labels).sum())
        for attack in (PGD(L1(2.0), steps=100), APGD(L1(2.0)), TargetedAPGD(L1(2.0)))
    }
    assert stands["TargetedAPGD"] <= stands["APGD"] < stands["PGD"]


@given(st.integers(0, 10**6), st.sampled_from([Linf(0.05), L2(0.3)]))
@settings(max_examples=20, deadline=None)
def test_more_steps_never_lose_on_a_model_without_local_optima(seed: int, threat: LpBall) -> None:
    # Not so in L1, where the stages of a longer run are not those of a shorter one.
    model = random_affine(2, 16, seed)
    images = 0.3 + 0.4 * torch.rand(3, 1, 4, 4, generator=draws(seed))
    labels = model(images).argmax(1)
    search = SearchModel(model, precision="float32")
    values = []
    for steps in (1, 3, 10, 30, 100):
        logits = model(APGD(threat, steps=steps, objective=cw_margin).run(search, images, labels, draws(1)).images)
        values.append(cw_margin(logits, labels).clamp(max=0))  # an image that is broken is worked on no more
    for fewer, more in itertools.pairwise(values):
        assert (more >= fewer - 2e-3).all()


def test_wrong_classes_are_ranked_without_the_label() -> None:
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0], [5.0, 1.0, 4.0, 2.0]])
    assert wrong_classes(logits, torch.tensor([1, 2])).tolist() == [[2, 3, 0], [0, 3, 1]]


def test_targets_are_tried_in_order_and_no_more_than_asked(net: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    images, labels = digits
    one, all_of_them = (
        TargetedAPGD(Linf(1e-4), steps=3, targets=targets).run(SearchModel(net), images, labels, draws()).calls
        for targets in (1, 99)
    )
    right = net(images).argmax(1) == labels
    # The clean pass; for each target a start and three steps, and the original's look at the end.
    assert (one[right] == 1 + 4 + 1).all()
    assert (all_of_them[right] == 1 + 9 * (4 + 1)).all()


@given(st.integers(0, 10**6), st.integers(4, 10))
@settings(max_examples=50, deadline=None)
def test_targeted_objectives_are_their_formulas(seed: int, classes: int) -> None:
    z = torch.randn(1, classes, generator=draws(seed))
    label, target = torch.randperm(classes, generator=draws(seed))[:2].tolist()
    reference = torch.tensor([[label, target]])
    ordered = sorted(z[0].tolist(), reverse=True)
    margin = float(z[0, target] - z[0, label])
    assert float(targeted_margin(z, reference)) == pytest.approx(margin, abs=1e-6)
    expected = margin / (ordered[0] - (ordered[2] + ordered[3]) / 2 + 1e-12)
    assert float(targeted_dlr(z, reference)) == pytest.approx(expected, rel=1e-4, abs=1e-6)


class Constant(nn.Module):
    """The same logits whatever the image, with a path for the gradient all the same."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, images: Tensor) -> Tensor:
        ramp = -torch.arange(self.classes, dtype=torch.float32)
        return ramp + 0 * images.flatten(1).sum(1, keepdim=True)


ODD: list[Attack] = [
    APGD(Linf(0.1), steps=3),
    APGD(L1(1.0), steps=5),
    TargetedAPGD(L2(0.1), steps=3, objective=targeted_margin),
    FAB(Linf(0.1), steps=3),
    FAB(L2(0.5), steps=3, targets=None),
    Square(L2(0.5), queries=20),
]


@pytest.mark.parametrize("attack", ODD, ids=lambda attack: f"{type(attack).__name__} {attack.threat}")
@pytest.mark.parametrize("classes", [2, 3, 8])
def test_a_constant_model_stands_and_nothing_breaks(attack: Attack, classes: int) -> None:
    images, labels = torch.rand(4, 3, 5, 5, generator=draws()), torch.zeros(4, dtype=torch.int64)
    found = attack(Constant(classes), images, labels, generator=draws())
    assert torch.isfinite(found).all()
    assert attack.threat.contains(found, images).all()


@pytest.mark.parametrize("attack", ODD, ids=lambda attack: f"{type(attack).__name__} {attack.threat}")
def test_logits_that_are_not_a_number_count_as_broken(attack: Attack) -> None:
    class Fragile(nn.Module):
        """Right on the clean images, whose pixels are all one half; a NaN for anything else."""

        def forward(self, images: Tensor) -> Tensor:
            away = (images - 0.5).flatten(1).abs().sum(1, keepdim=True)
            return torch.tensor([1.0, 0.0, -1.0]) + torch.where(away > 1e-4, torch.nan, 0.0) + 1e-3 * away

    images, labels = torch.full((3, 1, 5, 5), 0.5), torch.zeros(3, dtype=torch.int64)
    search = SearchModel(Fragile())
    found = attack.run(search, images, labels, draws()).images
    assert torch.isfinite(found).all()
    if not isinstance(attack, FAB):  # its first step follows a gradient that tells nothing of the cliff
        assert search.broken(found, labels).all()


@pytest.mark.parametrize("attack", [*ODD, AutoAttack(Linf(0.1))], ids=lambda a: f"{type(a).__name__} {a.threat}")
def test_input_that_makes_no_sense_is_refused_in_one_line(attack: Attack) -> None:
    model, images, labels = random_affine(3, 16, 0), torch.rand(2, 1, 4, 4), torch.tensor([0, 1])
    for bad_images, bad_labels, word in (
        (images, torch.tensor([0, 3]), "3 classes"),
        (images, torch.tensor([-1, 0]), "count from 0"),
        (images + 1, labels, r"\[0, 1\]"),
        (images * torch.nan, labels, r"\[0, 1\]"),
        (images.double(), labels, "float32"),
        (images, labels[:1], "one int64 label"),
    ):
        with pytest.raises(UserError, match=word) as error:
            attack(model, bad_images, bad_labels)
        assert "\n" not in str(error.value)


def test_options_that_contradict_are_refused() -> None:
    for make in (
        lambda: AutoAttack(Linf(0.1), version="strong"),  # type: ignore[arg-type]
        lambda: APGD(Linf(0.1), objective=targeted_dlr),
        lambda: TargetedAPGD(Linf(0.1), objective=cross_entropy),
        lambda: TargetedAPGD(Linf(0.1), targets=0),
        lambda: APGD(Linf(0.1), steps=0),
    ):
        with pytest.raises(UserError) as error:
            make()
        assert "\n" not in str(error.value)
    two = random_affine(2, 16, 0)
    for attack, word in ((APGD(Linf(0.1), objective=dlr), "at least 3"), (TargetedAPGD(Linf(0.1)), "at least 4")):
        with pytest.raises(UserError, match=word):
            attack(two, torch.rand(2, 1, 4, 4), torch.tensor([0, 1]))


@pytest.mark.parametrize("classes", [2, 3, 8])
def test_costs_bound_what_a_survivor_costs(classes: int) -> None:
    model = random_affine(classes, 16, 3)
    images = 0.5 + 0.01 * torch.rand(6, 1, 4, 4, generator=draws())
    labels = model(images).argmax(1)
    for threat in (Linf(1e-4), L2(1e-4), L1(1e-4)):
        for version in ("standard", "plus", "rand"):
            for attack in AutoAttack(threat, version).parts(classes).values():
                if isinstance(attack, Square):
                    attack = Square(threat, queries=30)
                passes = 0
                search = SearchModel(model)
                search.logits(images)

                def beat(n: int) -> None:
                    nonlocal passes
                    passes += n

                search.heartbeat = beat
                attack.run(search, images, labels, draws())
                assert 0.5 * attack.cost(classes) <= passes / len(images) <= 1.2 * attack.cost(classes) + 12, attack
