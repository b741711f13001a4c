"""Certified training against its equations: bounds, losses, schedules, initialisation, regularisers; and whole runs."""

import copy
import itertools
import json
from math import inf
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import redan
from redan.attacks.base import Attack
from redan.attacks.pgd import FGSM, PGD
from redan.attacks.search import SearchModel
from redan.certification.chain import observe_chain, read_chain
from redan.certification.crown import Crown
from redan.certification.interval import Interval, propagate
from redan.certification.reading import read_network
from redan.certification.regions import Region, Specification
from redan.data.pipeline import to_float
from redan.data.registry import load_dataset
from redan.data.types import Batch, Facts
from redan.errors import UserError
from redan.methods.base import Adversary, OptimizerConfig, Phase, ScheduleConfig
from redan.methods.certified import draw_weights, growth, imbalance, looseness
from redan.methods.crown_ibp import CROWNIBP, linear_margins
from redan.methods.ibp import IBP, interval_margins
from redan.methods.mtl_ibp import MTLIBP
from redan.methods.pgd_at import PGDAT
from redan.methods.sabr import SABR
from redan.methods.targets import LabelSmoothing
from redan.models.convnet import cnn7, conv_med
from redan.models.norms import Normalise
from redan.models.resnet import ResNet
from redan.recipes.build import build
from redan.recipes.schema import load_recipe
from redan.tensors import load_tensors
from redan.threats import L2, Linf
from redan.training import trainer

EPS = 0.05
FAMILIES: list[type[IBP]] = [IBP, CROWNIBP, SABR, MTLIBP]
NETWORKS = ("convmed", "cnn7")


def batch(n: int = 6, seed: int = 0) -> Batch:
    draws = torch.Generator().manual_seed(seed)
    return Batch(torch.rand(n, 1, 8, 8, generator=draws), torch.randint(4, (n,), generator=draws), torch.arange(n))


def tiny(name: str = "convmed", seed: int = 0) -> nn.Sequential:
    """On 8x8 images, with 4 classes; BatchNorm with statistics and scales of its own."""
    decided: dict[str, Any] = {"in_channels": 1, "size": 8, "classes": 4, "hidden": 12}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if name == "convmed":
            return conv_med(Normalise([0.3], [0.4]), w1=1, w2=1, **decided)
        network = cnn7(Normalise([0.3], [0.4]), width=4, **decided)
        for module in network:
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                for it, low in ((module.weight, 0.5), (module.running_var, 0.5), (module.bias, -0.5)):
                    assert it is not None
                    nn.init.uniform_(it, low, low + 1)
                nn.init.uniform_(module.running_mean, -0.5, 0.5)  # type: ignore[arg-type]
    return network


def adversary(**options: Any) -> Adversary:
    settings = {"steps": 3, "step_size": EPS / 4, "drop_broken": False} | options
    return Adversary(PGD(Linf(EPS), **settings), precision="float32")


def make(family: type[IBP] = IBP, epoch: float = 30.0, network: nn.Module | None = None, **options: Any) -> Any:
    """A method before a step; the radius grows in the epochs from 1 to 21 unless told otherwise."""
    plain = {"regularisation": 0.0, "initialise": False}
    method = family(network or tiny(), adversary=adversary(), targets=LabelSmoothing(), **plain | options)
    method.train()
    method.before_step(epoch, torch.Generator().manual_seed(7))
    return method


def gradients(loss: Tensor, method: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(method.parameters()), allow_unused=True, materialize_grads=True))


def close(first: list[Tensor], second: list[Tensor]) -> None:
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# Bounds.


@pytest.mark.parametrize("name", NETWORKS)
def test_bounds_of_the_training_path_are_the_certificates(name: str) -> None:
    network, (images, labels, _) = tiny(name).eval(), batch()
    region = Region.around(images, Linf(EPS))
    specification = Specification.robust(labels, 4)
    read = read_network(network, (1, 8, 8))
    expected = Interval("off")(read, region, specification)
    with torch.no_grad():
        graph = read_chain(network, (1, 8, 8))
        boxes = propagate(graph, region, "off")
        margins = interval_margins(graph, boxes, labels)
        linear = linear_margins(graph, boxes, labels)
    others = torch.arange(4) != labels[:, None]
    torch.testing.assert_close(margins[others].view(6, 3).double(), expected.margins, rtol=1e-4, atol=1e-4)
    assert torch.equal(margins[~others], torch.zeros(6))
    for found, box in zip((boxes[i] for i in graph.bent), expected.layers.values(), strict=True):
        torch.testing.assert_close(torch.stack(found).double(), torch.stack(box), rtol=1e-4, atol=1e-4)
    crown = Crown("interval", "off")(read, region, specification).margins
    torch.testing.assert_close(linear[others].view(6, 3).double(), crown, rtol=1e-3, atol=1e-3)
    assert torch.equal(linear[~others], torch.zeros(6))
    assert not torch.allclose(crown, expected.margins, atol=1e-2)


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 2**32),
    radius=st.floats(0.001, 0.3),
    corner=st.booleans(),
    name=st.sampled_from(NETWORKS),
    training=st.booleans(),
)
def test_no_image_in_the_ball_is_worse_than_the_bounds(
    seed: int, radius: float, corner: bool, name: str, training: bool
) -> None:
    network, (images, labels, _) = tiny(name, seed).train(training), batch(seed=seed)
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        _, moments = observe_chain(network, images)
        graph = read_chain(network, (1, 8, 8), moments)
        boxes = propagate(graph, Region.around(images, Linf(radius)), "off")
        share = torch.rand(20, *images.shape, generator=draws)
        low, high = (images - radius).clamp(min=0), (images + radius).clamp(max=1)
        reached = low + (share.round() if corner else share) * (high - low)
        logits = torch.stack([graph(it) for it in reached])
        true = (logits.gather(2, labels.expand(20, -1)[:, :, None]) - logits).amin(0)
        for bounds in (interval_margins, linear_margins):
            assert torch.all(bounds(graph, boxes, labels) <= true + 1e-4 * (1 + true.abs()))


def exact_margins(first: nn.Linear, last: nn.Linear, lower: Tensor, upper: Tensor, label: int) -> Tensor:
    """The least ``z_y - z_j`` on a rectangle: such a function is least where two of its creases or edges meet."""
    weight, bias = first.weight.double(), first.bias.double()
    lines = [(row, -shift) for row, shift in zip(weight, bias, strict=True)]
    lines += [(torch.eye(2).double()[axis], end[axis]) for end in (lower, upper) for axis in (0, 1)]
    points = []
    for (a, c), (b, d) in itertools.combinations(lines, 2):
        both = torch.stack([a, b])
        if both.det().abs() > 1e-9:
            points.append(torch.linalg.solve(both, torch.stack([c, d])))
    where = torch.stack(points)
    where = where[((where >= lower - 1e-12) & (where <= upper + 1e-12)).all(1)]
    logits = (where @ weight.t() + bias).relu() @ last.weight.double().t() + last.bias.double()
    return (logits[:, label, None] - logits).amin(0)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kind", ["open", "leaning", "closed"])
def test_linear_margins_against_the_exact_ones_of_a_tiny_network(seed: int, kind: str) -> None:
    torch.manual_seed(seed)
    first, last = nn.Linear(2, 6), nn.Linear(6, 3)
    image, radius = torch.rand(1, 1, 1, 2) * 0.4 + 0.3, 0.1
    gains: list[float] = []
    with torch.no_grad():
        reach = radius * first.weight.abs().sum(1)
        middle = {"open": 0.0, "leaning": -0.3, "closed": 2.0}[kind] * reach
        if kind == "open":
            middle = reach * (2 * torch.rand(6) - 1)
        first.bias.copy_(middle - first.weight @ image.flatten())
        graph = read_chain(nn.Sequential(nn.Flatten(), first, nn.ReLU(), last), (1, 1, 2))
        boxes = propagate(graph, Region.around(image, Linf(radius)), "off")
        for label in range(3):
            labels = torch.tensor([label])
            crown, interval = linear_margins(graph, boxes, labels)[0], interval_margins(graph, boxes, labels)[0]
            box = (image.flatten().double() - radius, image.flatten().double() + radius)
            true = exact_margins(first, last, *box, label).float()
            assert torch.all(crown <= true + 1e-5) and torch.all(interval <= true + 1e-5)
            if kind == "closed":  # all is linear
                torch.testing.assert_close(crown, true, rtol=1e-4, atol=1e-5)
            if kind != "open":  # lower lines are 0, as intervals have it, and what is left is minimised at once
                assert torch.all(crown >= interval - 1e-5)
                gains.append((crown - interval).max().item())
    assert kind == "open" or max(gains) > 1e-4


def test_linear_margins_have_finite_gradients_where_a_box_is_a_point() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    with torch.no_grad():
        for parameter in network[1].parameters():
            parameter.fill_(-1.0)  # all off, so that nothing behind it moves
    graph = read_chain(network, (1, 1, 2))
    boxes = propagate(graph, Region.around(torch.rand(2, 1, 1, 2), Linf(0.1)), "off")
    assert torch.equal(*boxes[3])
    margins = linear_margins(graph, boxes, torch.tensor([0, 1]))
    assert all(torch.isfinite(it).all() for it in gradients(margins.square().sum(), network))


# BatchNorm.


def test_batch_norm_in_training_normalises_bounds_by_the_clean_images() -> None:
    network, (images, _, _) = tiny("cnn7").train(), batch()
    twin = copy.deepcopy(network)
    clean, moments = observe_chain(network, images)
    graph = read_chain(network, (1, 8, 8), moments)
    expected = twin(images)
    torch.testing.assert_close(clean, expected)
    torch.testing.assert_close(graph(images), expected, rtol=1e-4, atol=1e-5)
    close(gradients(graph(images).square().sum(), network), gradients(expected.square().sum(), twin))
    torch.testing.assert_close(network.state_dict(), twin.state_dict())  # statistics have moved once
    boxes = propagate(graph, Region(images, images), "off")
    torch.testing.assert_close(boxes[-1][0], expected, rtol=1e-3, atol=1e-4)
    assert not moments.keys() - {i for i, it in enumerate(network) if isinstance(it, nn.BatchNorm1d | nn.BatchNorm2d)}
    assert len(moments) == 6 and observe_chain(network.eval(), images)[1] == {}


@pytest.mark.parametrize("epoch", [0.0, 30.0])
def test_gradients_go_through_the_moments(epoch: float) -> None:
    """Times any factor, a layer before a BatchNorm gives the same loss: the gradient by that factor is 0."""
    network = tiny("cnn7").train()
    for module in network:
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.eps = 1e-12
    make(network=network, epoch=epoch)(batch()).loss.backward()
    before = [it for it, after in itertools.pairwise(network) if isinstance(after, nn.BatchNorm1d | nn.BatchNorm2d)]
    for layer in before:
        weight = cast(nn.Parameter, layer.weight)
        assert weight.grad is not None and weight.grad.norm() > 0
        along = torch.cosine_similarity(weight.detach().flatten(), weight.grad.flatten(), 0)
        assert abs(float(along)) < 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_moves_the_statistics_once(family: type[IBP]) -> None:
    method = make(family, network=tiny("cnn7"))
    twin = copy.deepcopy(method.network)
    examples = batch()
    method(examples)
    twin(examples.images)
    torch.testing.assert_close(method.network.state_dict(), twin.state_dict())


# The radius.


def test_the_radius_grows_smoothly_from_nothing_to_all() -> None:
    assert growth(0) == growth(-1) == 0 and growth(1) == growth(2) == 1
    values = [growth(i / 1000) for i in range(1001)]
    steps = [after - before for before, after in itertools.pairwise(values)]
    assert all(it > 0 for it in steps)
    assert all(after >= before - 1e-12 for before, after in itertools.pairwise(steps))  # never slows down
    assert max(steps) < 1.4e-3 and steps[0] < 1e-9
    # A power of 4 up to a quarter, then its tangent: four times as high at twice a quarter minus a quarter's share.
    assert growth(0.25) / growth(0.125) == pytest.approx(16)
    assert growth(0.5) / growth(0.25) == pytest.approx(5)
    assert growth(0.75) / growth(0.25) == pytest.approx(9)


@pytest.mark.parametrize(("epoch", "share"), [(0, 0), (2.9, 0), (3, 0), (4, growth(0.2)), (8, 1), (50, 1)])
def test_the_radius_waits_for_the_warmup_and_ends_with_the_ramp(epoch: float, share: float) -> None:
    method = make(epoch=epoch, warmup=3.0, ramp=5.0, radius_factor=2.0)
    assert method.share == pytest.approx(share)
    output = method(batch())
    assert output.scalars["radius"].item() == pytest.approx(share * 2 * EPS)


def test_without_warmup_and_ramp_the_radius_is_there_at_once() -> None:
    assert make(epoch=0, warmup=0.0, ramp=0.0).share == 1


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_radius_the_loss_is_plain(family: type[IBP], name: str) -> None:
    method, examples = make(family, epoch=0.5, network=tiny(name)), batch()
    twin = copy.deepcopy(method.network)
    assert torch.equal(method.perturb(examples), examples.images)
    output = method(examples)
    loss = F.cross_entropy(twin(examples.images), examples.labels)
    torch.testing.assert_close(output.loss, loss)
    close(gradients(output.loss, method.network), gradients(loss, twin))
    assert output.adversarial_logits is None and output.clean_logits is not None


# Losses.


def halves(module: nn.Conv2d | nn.Linear, plus: Tensor, minus: Tensor) -> Tensor:
    """Positive weights with the one, negative ones with the other."""
    up, down = module.weight.clamp(min=0), module.weight.clamp(max=0)
    if isinstance(module, nn.Linear):
        return F.linear(plus, up, module.bias) + F.linear(minus, down)
    place: Any = (module.stride, module.padding)
    return F.conv2d(plus, up, module.bias, *place) + F.conv2d(minus, down, None, *place)


def worst(method: IBP, examples: Batch, radius: float, centre: Tensor | None = None) -> Tensor:
    """Logits, 0 for the label, from the definition: each layer's box by its weights' signs; without BatchNorm."""
    region = Region.around(examples.images if centre is None else centre, Linf(radius))
    lower, upper = region.lower.float(), region.upper.float()
    layers = list(method.network.children())
    for module in layers[:-1]:
        if isinstance(module, nn.Conv2d | nn.Linear):
            lower, upper = halves(module, lower, upper), halves(module, upper, lower)
        else:
            lower, upper = module(lower), module(upper)
    last = layers[-1]
    assert isinstance(last, nn.Linear)
    rows = []
    for k, y in enumerate(examples.labels.tolist()):
        weight, bias = last.weight - last.weight[y], last.bias - last.bias[y]
        rows.append(weight.clamp(min=0) @ upper[k] + weight.clamp(max=0) @ lower[k] + bias)
    return torch.stack(rows)


@pytest.mark.parametrize("epoch", [11.0, 30.0])
@pytest.mark.parametrize("kappa", [(0.0, 0.0), (1.0, 0.5), (0.25, 0.25)])
def test_ibp_is_the_loss_at_the_worst_logits(kappa: tuple[float, float], epoch: float) -> None:
    method, examples = make(epoch=epoch, kappa=kappa, l1=0.01, radius_factor=1.5), batch()
    share = growth(0.5) if epoch == 11 else 1.0
    weight = kappa[0] + (kappa[1] - kappa[0]) * share
    output = method(examples)
    logits = worst(method, examples, share * 1.5 * EPS)
    loss = (1 - weight) * F.cross_entropy(logits, examples.labels)
    loss = loss + weight * F.cross_entropy(method.network(examples.images), examples.labels)
    loss = loss + 0.01 * sum(method.network[i].weight.abs().sum() for i in (1, 3, 6, 8))
    torch.testing.assert_close(output.loss, loss)
    torch.testing.assert_close(output.adversarial_logits, logits, rtol=1e-4, atol=1e-5)
    close(gradients(output.loss, method.network), gradients(loss, method.network))


def test_smoothed_labels_find_their_logits() -> None:
    method, examples = make(), batch()
    method.targets = LabelSmoothing(0.3)
    expected = F.cross_entropy(worst(method, examples, EPS), examples.labels, label_smoothing=0.3)
    torch.testing.assert_close(method(examples).loss, expected)


@pytest.mark.parametrize("epoch", [5.0, 11.0, 30.0])
@pytest.mark.parametrize("name", NETWORKS)
def test_sabr_on_the_whole_ball_is_ibp(name: str, epoch: float) -> None:
    whole = make(SABR, epoch, tiny(name), box=1.0, regularisation=0.5)(batch())
    ball = make(IBP, epoch, tiny(name), regularisation=0.5)(batch())
    torch.testing.assert_close(whole.loss, ball.loss, rtol=0, atol=0)
    assert not torch.allclose(make(SABR, epoch, tiny(name), box=0.5)(batch()).loss, ball.loss)


@pytest.mark.parametrize("box", [0.1, 0.7])
@pytest.mark.parametrize("epoch", [11.0, 30.0])
def test_small_boxes_lie_in_the_ball(epoch: float, box: float) -> None:
    method, examples = make(SABR, epoch, box=box), batch(40)
    radius = method.share * EPS
    centres = method.perturb(examples)
    region = method.region(examples, centres, radius)
    assert torch.all(region.lower >= (examples.images.double() - radius).clamp(min=0) - 1e-7)
    assert torch.all(region.upper <= (examples.images.double() + radius).clamp(max=1) + 1e-7)
    inside = (region.lower > 0) & (region.upper < 1)
    torch.testing.assert_close(
        (region.upper - region.lower)[inside],
        torch.full((int(inside.sum()),), 2 * box * radius, dtype=torch.float64),
        rtol=1e-4,
        atol=0,
    )
    assert (centres - examples.images).abs().max() == pytest.approx((1 - box) * radius, rel=1e-3)
    with torch.no_grad():  # they are where the loss is high
        losses = [F.cross_entropy(method.network(it), examples.labels) for it in (examples.images, centres)]
    assert losses[1] > losses[0]
    torch.testing.assert_close(
        method.loss(examples, centres).loss,
        F.cross_entropy(worst(method, examples, box * radius, centres), examples.labels),
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_mtl_ibp_ends_in_ibp_and_in_adversarial_training(name: str) -> None:
    examples = batch()
    bounded = make(MTLIBP, network=tiny(name), alpha=1.0)
    ball = make(IBP, network=tiny(name))
    close(*(gradients(it(examples).loss, it.network) for it in (bounded, ball)))
    torch.testing.assert_close(bounded(examples).loss, ball(examples).loss)
    attacked = make(MTLIBP, network=tiny(name), alpha=0.0)
    plain = PGDAT(tiny(name), adversary=adversary(), targets=LabelSmoothing())
    # In evaluation mode, for BatchNorm's sake: there the clean images' moments count, here the attacked ones' own.
    plain.train(name == "convmed")
    attacked.train(name == "convmed")
    plain.before_step(30.0, torch.Generator().manual_seed(7))
    outputs = [it(examples) for it in (attacked, plain)]
    torch.testing.assert_close(outputs[0].loss, outputs[1].loss)
    torch.testing.assert_close(outputs[0].adversarial_logits, outputs[1].adversarial_logits, rtol=1e-4, atol=1e-5)
    close(*(gradients(out.loss, it.network) for out, it in zip(outputs, (attacked, plain), strict=True)))


def test_the_attacks_steps_grow_with_its_ball_and_follow_the_weights() -> None:
    method, examples = make(MTLIBP, epoch=11.0, attack_factor=3.0), batch()
    radius = 3 * growth(0.5) * EPS
    expected = PGD(Linf(radius), steps=3, step_size=radius / 4, drop_broken=False)
    for _ in range(2):
        method.before_step(11.0, torch.Generator().manual_seed(3))
        draws = torch.Generator().manual_seed(3)
        fresh = SearchModel(copy.deepcopy(method.network), precision="float32")
        found = expected(fresh, examples.images, examples.labels, generator=draws)
        torch.testing.assert_close(method.perturb(examples), found, rtol=0, atol=1e-5)
        with torch.no_grad():
            method.network[-1].weight.neg_()


def test_mtl_ibp_is_a_mean_of_both_and_may_attack_further_than_it_bounds() -> None:
    method, examples = make(MTLIBP, alpha=0.3, attack_factor=3.0), batch()
    found = method.perturb(examples)
    assert (found - examples.images).abs().max() == pytest.approx(3 * EPS, rel=1e-3)  # 3 steps of three quarters of it
    loss = 0.3 * F.cross_entropy(worst(method, examples, EPS), examples.labels)
    loss = loss + 0.7 * F.cross_entropy(method.network(found), examples.labels)
    torch.testing.assert_close(method.loss(examples, found).loss, loss)


@pytest.mark.parametrize(("epoch", "share"), [(11.0, growth(0.5)), (30.0, 1.0)])
@pytest.mark.parametrize("beta", [(1.0, 0.0), (1.0, 1.0), (0.0, 0.0), (0.2, 0.6)])
def test_crown_ibp_mixes_the_margins(beta: tuple[float, float], epoch: float, share: float) -> None:
    method, examples = make(CROWNIBP, epoch, beta=beta), batch()
    graph = read_chain(method.chain, (1, 8, 8))
    boxes = propagate(graph, Region.around(examples.images, Linf(share * EPS)), "off")
    weight = beta[0] + (beta[1] - beta[0]) * share
    margins = weight * linear_margins(graph, boxes, examples.labels)
    margins = margins + (1 - weight) * interval_margins(graph, boxes, examples.labels)
    loss = F.cross_entropy(-margins, examples.labels)
    output = method(examples)
    torch.testing.assert_close(output.loss, loss)
    close(gradients(output.loss, method.network), gradients(loss, method.network))
    torch.testing.assert_close(output.adversarial_logits, -margins)


@pytest.mark.parametrize("family", FAMILIES)
def test_autocast_leaves_the_bounds_alone(family: type[IBP]) -> None:
    losses = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses.append(make(family, 11.0, tiny("cnn7"), regularisation=0.5)(batch()).loss)
    assert torch.equal(*losses)


# Initialisation and regularisers.


def test_fresh_boxes_neither_grow_nor_shrink() -> None:
    torch.manual_seed(0)
    width, depth = 1000, 6
    layers: list[nn.Module] = [nn.Conv2d(10, width, 10), nn.ReLU(), nn.Flatten()]
    for _ in range(depth):
        layers += [nn.Linear(width, width), nn.ReLU()]
    last = nn.Linear(width, 10)
    before, network = last.weight.clone(), nn.Sequential(*layers, last)
    draw_weights(network)
    assert torch.equal(last.weight, before)
    for module in layers:
        if isinstance(module, nn.Conv2d | nn.Linear):
            assert module.weight.abs().mean().item() == pytest.approx(2 / 1000, rel=0.01)
            assert module.weight.std().item() == pytest.approx((2 * torch.pi) ** 0.5 / 1000, rel=0.01)
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
    # Signed images, so that the first layer's centres are as often above as below zero; the ReLU between halves.
    images = torch.randn(8, 10, 10, 10)
    with torch.no_grad():
        boxes = propagate(read_chain(network, (10, 10, 10)), Region(images - 0.01, images + 0.01), "off")
    bent = [boxes[1]] + [boxes[i] for i in range(4, 4 + 2 * depth, 2)]
    radii = [((upper - lower) / 2).mean().item() for lower, upper in bent]
    assert radii[0] == pytest.approx(2 * 0.01, rel=0.01)  # no ReLU before it
    for before_, after in itertools.pairwise(radii):
        assert after / before_ == pytest.approx(1, abs=0.15)


def box(centre: list[float], radius: float) -> tuple[Tensor, Tensor]:
    middle = torch.tensor([centre])
    return middle - radius, middle + radius


def test_looseness_counts_what_grows_past_twice_the_image() -> None:
    entered = box([0.0, 0.5], 0.1)
    assert looseness(entered, [box([1.0], 0.05), box([0.0], 0.1), box([3.0], 0.2)]).item() == pytest.approx(0, abs=1e-6)
    # 0.1 / 0.4 is a quarter, half of tau.
    assert looseness(entered, [box([1.0], 0.4)]).item() == pytest.approx(0.5)
    assert looseness(entered, [box([1.0], 0.4), box([1.0], 0.1)]).item() == pytest.approx(0.25)
    assert looseness(entered, [box([1.0], 1e9)]).item() == pytest.approx(1)
    assert looseness(entered, [box([1.0], 0.0)]).item() == 0


def test_imbalance_counts_relus_that_are_all_off_or_all_on() -> None:
    assert imbalance([box([1.0, -1.0, 2.0, -2.0, 0.0], 0.1)]).item() == pytest.approx(0)
    # All off: both ratios are 0.
    for centre in ([-1.0, -2.0], [1.0, 2.0], [0.0, 0.0]):
        assert imbalance([box(centre, 0.1)]).item() == pytest.approx(2)
    # Open ones count for neither: as if [3, -1, -1] were all, with its mean 1/3 over the three.
    sums, mean = 2 / 3, 1 / 3
    spreads = (3 - mean) ** 2, 2 * (1 + mean) ** 2
    ratio = min(spreads) / max(spreads)
    expected = (max(0, 0.5 - sums) + max(0, 0.5 - ratio)) / 0.5
    assert imbalance([box([3.0, -1.0, -1.0], 0.1)]).item() == pytest.approx(expected)
    assert imbalance([box([3.0, -1.0, -1.0, 0.4, -0.4], 0.5)]).item() != pytest.approx(2)
    # 1 to 4 is half of tau.
    mean = -3 / 2
    ratio = (1 - mean) ** 2 / (4 + mean) ** 2
    assert imbalance([box([1.0, -4.0], 0.1)]).item() == pytest.approx(0.5 + max(0, 0.5 - min(ratio, 1 / ratio)) * 2)


@pytest.mark.parametrize("centre", [[-1.0, -2.0], [1.0, 2.0], [0.0, 0.0], [1.0, -4.0]])
def test_regularisers_have_finite_gradients(centre: list[float]) -> None:
    middle = torch.tensor([centre], requires_grad=True)
    for radius in (0.0, 0.1):
        bent = [(middle - radius, middle + radius)]
        loss = imbalance(bent) + looseness(box([0.0], 0.1), bent)
        assert torch.isfinite(torch.autograd.grad(loss, middle)[0]).all()


@pytest.mark.parametrize(("epoch", "share"), [(0.5, 0.0), (11.0, growth(0.5)), (30.0, 1.0)])
@pytest.mark.parametrize("name", NETWORKS)
def test_regularisers_fade_as_the_radius_grows(name: str, epoch: float, share: float) -> None:
    plain, method = make(epoch=epoch, network=tiny(name)), make(epoch=epoch, network=tiny(name), regularisation=0.8)
    outputs = [it(batch()) for it in (plain, method)]
    added = (outputs[1].loss - outputs[0].loss).item()
    if share == 1:
        assert added == 0 and "looseness" not in outputs[1].scalars
        return
    terms = sum(outputs[1].scalars[key].item() for key in ("looseness", "imbalance"))
    assert added == pytest.approx(0.8 * (1 - share) * terms, abs=1e-5)
    assert terms > 0.1
    # What enters the network is the normalised image, whose box is as much wider as it was divided by.
    with torch.no_grad():
        _, moments = observe_chain(method.chain, batch().images)
        graph = read_chain(method.chain, (1, 8, 8), moments)
        boxes = propagate(graph, Region.around(batch().images, Linf(max(share, 1e-3) * EPS)), "off")
    bent = [boxes[i] for i in graph.bent]
    assert outputs[1].scalars["looseness"].item() == pytest.approx(looseness(boxes[1], bent).item(), abs=1e-4)
    assert outputs[1].scalars["imbalance"].item() == pytest.approx(imbalance(bent).item(), abs=1e-4)


def test_initialisation_is_asked_for() -> None:
    same, other = (make(initialise=it).network.state_dict() for it in (False, True))
    changed = {name for name in same if not torch.equal(same[name], other[name])}
    assert changed == {"1.weight", "3.weight", "6.weight"}


# Whole runs.

TINY: dict[str, Any] = {
    "name": "tiny",
    "data": {"name": "digits", "train_samples": 200, "validation_samples": 50},
    "model": {"name": "cnn7", "width": 2, "hidden": 10},
    "threat": "linf:0.05",
    "method": {"name": "sabr", "warmup": 1, "ramp": 1, "l1": 1e-4},
    "attack": {"steps": 2, "step_size": 0.0125},
    "optimizer": {"name": "adam", "lr": 0.01, "weight_decay": 0.0},
    "epochs": 3,
    "batch_size": 50,
}


def run(folder: Path, recipe: dict[str, Any] = TINY, **options: Any) -> Path:
    folder.parent.mkdir(exist_ok=True, parents=True)
    path = folder.parent / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return redan.train(path, folder, progress=False, **options)


def test_a_resumed_run_comes_to_bitwise_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(tmp_path / "whole")
    real, taken = trainer._Training._train_step, []

    def counted(self: Any, *args: Any) -> None:
        real(self, *args)
        taken.append(1)
        self.stop.requested = len(taken) == 6  # while the radius grows

    with monkeypatch.context() as context:
        context.setattr(trainer._Training, "_train_step", counted)
        with pytest.raises(redan.Stopped, match="--resume"):
            run(tmp_path / "parts")
    torch.manual_seed(5)  # another process's randomness is elsewhere
    parts = run(tmp_path / "parts", resume=True)
    first, second = (load_tensors(it / "model-last.safetensors")[0] for it in (whole, parts))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    records = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [it["radius"] for it in records][::2] == [0, pytest.approx(0.05)] and 0 < records[1]["radius"] < 0.05


def test_training_on_bounds_makes_bounds_hold(tmp_path: Path) -> None:
    recipe = TINY | {
        "data": {"name": "digits", "validation_samples": 137},
        "model": {"name": "convmed", "w1": 1, "w2": 1, "hidden": 50},
        "threat": "linf:0.1",
        "attack": {"steps": 3, "step_size": 0.05},
        "optimizer": {"name": "adam", "lr": 0.02, "weight_decay": 0.0},
        "schedule": {"name": "cosine"},
        "gradient_clip": 10.0,
        "epochs": 16,
        "batch_size": 100,
    }
    images, labels = (load_dataset("digits", None).test.images, load_dataset("digits", None).test.labels)
    region, specification = Region.around(to_float(images), Linf(0.1)), Specification.robust(labels, 10)
    proved, right = {}, {}
    for name, options in (("pgd-at", {}), ("ibp", {"warmup": 1, "ramp": 8})):
        shorter = {"epochs": 6} if name == "pgd-at" else {}
        network = redan.load(run(tmp_path / name, recipe | shorter | {"method": {"name": name, **options}})).eval()
        bounds = Interval()(read_network(network, (1, 8, 8)), region, specification)
        proved[name] = specification.shown(bounds.margins).float().mean().item()
        right[name] = (network(to_float(images)).argmax(1) == labels).float().mean().item()
    assert proved["pgd-at"] < 0.05 and right["pgd-at"] > 0.8
    assert proved["ibp"] > 0.4 and right["ibp"] > 0.75


@pytest.mark.parametrize("name", ["ibp", "crown-ibp", "sabr", "mtl-ibp"])
def test_the_mini_recipes_take_as_many_steps_as_colts(name: str) -> None:
    recipe, colt = load_recipe(f"{name}-mnist-mini"), load_recipe("colt-mnist-mini")
    assert recipe.method.name == name
    assert recipe.epochs == colt.epochs * len(colt.method.options["layers"])
    same = ("data", "model", "threat", "batch_size")
    assert all(getattr(recipe, key) == getattr(colt, key) for key in same)
    other, ibp = load_recipe(f"{name}-mnist-mini-cnn7"), load_recipe("ibp-mnist-mini-cnn7")
    assert other.model == ibp.model and other.model.name == "cnn7"
    differ = {"name", "description", "model"}
    assert other.model_dump(exclude=differ) == recipe.model_dump(exclude=differ)


# The adversary's steps and their size in 255ths, epochs, when the rate falls, and what is the method's own.
PUBLISHED: dict[str, tuple[tuple[int, float] | None, int, tuple[int, int], dict[str, Any]]] = {
    "ibp-cifar10-2-cnn7": (None, 160, (120, 140), {}),
    "ibp-cifar10-8-cnn7": (None, 160, (120, 140), {}),
    "crown-ibp-cifar10-2-cnn7": (None, 160, (120, 140), {"beta": (1.0, 0.0)}),
    "crown-ibp-cifar10-8-cnn7": (None, 160, (120, 140), {"beta": (1.0, 0.0)}),
    "sabr-cifar10-2-cnn7": ((8, 0.5), 160, (119, 139), {"box": 0.1, "l1": 1e-6}),
    "sabr-cifar10-8-cnn7": ((8, 2.0), 180, (139, 159), {"box": 0.7, "l1": 0.0}),
    "mtl-ibp-cifar10-2-cnn7": ((8, 0.5), 160, (120, 140), {"alpha": 0.004, "attack_factor": 2.1, "l1": 3e-6}),
    "mtl-ibp-cifar10-8-cnn7": ((1, 80.0), 260, (180, 220), {"alpha": 0.5, "attack_factor": 1.0, "l1": 1e-7}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipes_have_the_published_numbers(name: str) -> None:
    recipe, (attack, epochs, milestones, own) = load_recipe(name), PUBLISHED[name]
    build(recipe, Facts(3, 32, tuple("0123456789"), (0.5,), (0.2,)))
    same = {"radius_factor": 1, "warmup": 1, "ramp": 80, "kappa": (0, 0), "regularisation": 0.5, "l1": 0.0}
    assert recipe.method.options == same | {"initialise": True} | own and name.startswith(recipe.method.name)
    assert recipe.threat == f"linf:{name.split('-cifar10-')[1][0]}/255"
    if attack is not None:
        assert recipe.attack.steps == attack[0] and recipe.attack.step_size == pytest.approx(attack[1] / 255)
    schedule, optimizer = recipe.schedule, recipe.optimizer
    assert (recipe.epochs, schedule.name, tuple(schedule.milestones)) == (epochs, "multistep", milestones)
    assert (optimizer.name, optimizer.lr, schedule.factor, recipe.batch_size) == ("adam", 5e-4, 0.2, 128)
    assert recipe.gradient_clip == (None if "sabr" in name else 10.0)
    assert (recipe.model.name, recipe.model.options) == ("cnn7", {"width": 64, "hidden": 512})
    assert (recipe.data.validation_samples, recipe.data.train_samples) == (0, None)


# What cannot be.

PLANNED = Phase("training", 10, OptimizerConfig(lr=0.1), ScheduleConfig())


def test_the_radius_must_be_there_before_the_end() -> None:
    with pytest.raises(UserError, match="grows for 1 \\+ 20 epochs, but there are 10; set method.warmup and method"):
        make().phases(PLANNED)
    with pytest.raises(UserError, match="grows for 3 \\+ 8 epochs"):
        make(warmup=3.0, ramp=8.0).phases(PLANNED)
    assert make(warmup=2.0, ramp=8.0).phases(PLANNED) == [PLANNED]


def test_attacks_on_held_out_images_choose_nothing() -> None:
    assert all(make(family).selects_by == "last" for family in FAMILIES)


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        (IBP, {"radius_factor": 0.0}, "a radius_factor above 0"),
        (IBP, {"radius_factor": inf}, "a radius_factor above 0"),
        (IBP, {"warmup": -1.0}, "warmup of at least 0"),
        (IBP, {"ramp": float("nan")}, "ramp of at least 0"),
        (IBP, {"regularisation": -0.1}, "regularisation of at least 0"),
        (IBP, {"l1": -0.1}, "l1 of at least 0"),
        (IBP, {"kappa": (0.0, 1.1)}, "two numbers from 0 to 1 as kappa"),
        (CROWNIBP, {"beta": (-0.1, 0.0)}, "two numbers from 0 to 1 as beta"),
        (SABR, {"box": 0.0}, "a box above 0 and up to 1"),
        (SABR, {"box": 1.1}, "a box above 0 and up to 1"),
        (MTLIBP, {"alpha": 1.1}, "an alpha from 0 to 1"),
        (MTLIBP, {"attack_factor": 0.0}, "an attack_factor above 0"),
    ],
)
def test_what_is_out_of_range_is_refused(family: type[IBP], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(family, **options)


@pytest.mark.parametrize(("key", "value"), [("method.beta", [1]), ("method.kappa", [])])
def test_a_list_that_is_too_short_is_told(key: str, value: list[int]) -> None:
    with pytest.raises(UserError, match=r"a list of 2 is needed, got \["):
        load_recipe("crown-ibp-mnist-mini", {key: value})


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (PGD(L2(0.5), 2, 0.1), "certified training"),
        (PGD(Linf(0.0), 2, 0.1), "a threat whose radius is above 0"),
        (FGSM(Linf(0.1)), "from a PGD as its adversary"),
    ],
)
def test_other_threats_and_attacks_are_refused(attack: Attack, message: str) -> None:
    with pytest.raises(UserError, match=message):
        IBP(tiny(), adversary=Adversary(attack), targets=LabelSmoothing())


def test_other_networks_are_refused() -> None:
    residual = ResNet(Normalise([0.3], [0.4]), depths=(1, 1, 1, 1), classes=4, in_channels=1, width=2)
    bare = nn.Sequential(nn.Conv2d(1, 4, 8), nn.BatchNorm2d(4, affine=False), nn.Flatten(), nn.Linear(4, 4))
    for network, message in (
        (residual, "linear layers, BatchNorms and ReLUs is needed, such as convmed; this is a ResNet"),
        (bare, "BatchNorms and ReLUs is needed, such as convmed; layer '1' is BatchNorm2d"),
        (tiny()[:-1], "whose last layer is linear, this one's is ReLU"),
    ):
        with pytest.raises(UserError, match=message):
            make(network=network)
