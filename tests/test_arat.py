"""AR-AT against its equations, part by part."""

import copy
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
from torch import Generator, Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from redan.attacks.apgd import APGD
from redan.attacks.pgd import PGD
from redan.attacks.search import Mode
from redan.data.types import Batch
from redan.errors import UserError
from redan.methods.arat import ARAT, Predictor
from redan.methods.base import Adversary, Method
from redan.methods.registry import build_method
from redan.methods.targets import LabelSmoothing
from redan.methods.weight_averaging import WeightAveraging, WeightAveragingConfig
from redan.methods.weight_perturbation import WeightPerturbation, WeightPerturbationConfig
from redan.models.norms import Normalise
from redan.models.registry import build_model
from redan.models.split_norm import Branch, SplitBatchNorm2d, merge_batch_norm, split_batch_norm, using_branch
from redan.models.taps import FeatureTaps, without_taps
from redan.threats import L2, Linf

EPS = 8 / 255
STEPS = 10


def network(name: str = "resnet18", **options: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        normalise = Normalise([0.5] * 3, [0.25] * 3)
        return build_model(name, normalise, in_channels=3, size=8, classes=4, **(options or {"width": 2}))


def batch(seed: int = 0, n: int = 8) -> Batch:
    draws = torch.Generator().manual_seed(seed)
    return Batch(torch.rand(n, 3, 8, 8, generator=draws), torch.randint(4, (n,), generator=draws), torch.arange(n))


def make(mode: Mode = "eval", *, moves: bool = False, net: nn.Module | None = None, **options: Any) -> ARAT:
    attack = PGD(Linf(EPS), steps=STEPS, step_size=2 / 255, drop_broken=False)
    adversary = Adversary(attack, mode, moves, "float32")
    with torch.random.fork_rng():
        torch.manual_seed(1)  # of the predictors
        method = ARAT(net or network(), adversary=adversary, targets=LabelSmoothing(), **options)
    method.train()
    method.before_step(0.0, torch.Generator().manual_seed(7))
    return method


def perturbed(seed: int = 5) -> Tensor:
    noise = 2 * torch.rand(batch().images.shape, generator=torch.Generator().manual_seed(seed)) - 1
    return (batch().images + EPS * noise).clamp(0, 1)


def features(net: nn.Module, layers: tuple[str, ...], images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits and features, by hooks of this test's own."""
    kept: list[Tensor] = []
    handles = [
        net.get_submodule(name).register_forward_hook(lambda m, i, out: kept.append(out.relu().mean((2, 3))))
        for name in layers
    ]
    logits = net(images)
    for handle in handles:
        handle.remove()
    return logits, kept


# The loss.


@pytest.mark.parametrize("split_bn", [True, False])
@pytest.mark.parametrize("predictor", [True, False])
@pytest.mark.parametrize("stop_gradient", [True, False])
def test_the_loss_and_its_gradient_are_the_papers(split_bn: bool, predictor: bool, stop_gradient: bool) -> None:
    method = make(split_bn=split_bn, predictor=predictor, stop_gradient=stop_gradient)
    method.balance.fill_(0.3)
    reference, layers = copy.deepcopy(method), method.taps.layers
    output = method.loss(batch(), perturbed())
    output.loss.backward()

    with using_branch(reference.network, "clean"):
        clean, z = features(reference.network, layers, batch().images)
    attacked, z_adv = features(reference.network, layers, perturbed())
    targets = [feature.detach() if stop_gradient else feature for feature in z]
    distances = [
        (1 - (h(a) * c).sum(1) / (h(a).norm(dim=1) * c.norm(dim=1))).mean()
        for h, a, c in zip(copy.deepcopy(reference).predictors, z_adv, targets, strict=True)
    ]
    y = batch().labels
    loss = 0.3 * F.cross_entropy(attacked, y) + 0.7 * F.cross_entropy(clean, y) + 30 * sum(distances) / 4
    loss.backward()
    torch.testing.assert_close(output.loss, loss, rtol=1e-6, atol=1e-6)
    assert output.scalars is not None
    invariance = sum(F.cosine_similarity(a, c).mean() for a, c in zip(z_adv, z, strict=True)) / 4
    torch.testing.assert_close(output.scalars["invariance"], invariance)
    assert not output.scalars["invariance"].requires_grad
    for (name, mine), theirs in zip(method.network.named_parameters(), reference.network.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_without_its_parts_it_is_adversarial_training_plus_clean_cross_entropy() -> None:
    method = make(gamma=0.0, split_bn=False, auto_balance=False)
    plain = network().train()
    expected = F.cross_entropy(plain(perturbed()), batch().labels) + F.cross_entropy(
        plain(batch().images), batch().labels
    )
    torch.testing.assert_close(method.loss(batch(), perturbed()).loss, expected, rtol=1e-6, atol=1e-6)


def test_symmetric_is_the_mean_of_both_ways() -> None:
    method, twin = make(symmetric=True), make()
    z, z_adv = {}, {}
    for i, layer in enumerate(method.taps.layers):
        draws = torch.Generator().manual_seed(i)
        z[layer], z_adv[layer] = (torch.rand(8, 16, generator=draws) for _ in range(2))
    there = copy.deepcopy(twin).distance(z_adv, z)
    back = copy.deepcopy(twin).distance(z, z_adv)
    torch.testing.assert_close(method.distance(z_adv, z), (there + back) / 2)
    assert not torch.isclose(there, back)


@pytest.mark.parametrize(("stop_gradient", "share"), [(False, 1.0), (True, 0.5)])
def test_symmetric_moves_both_sides_and_all_the_way_without_stopped_gradient(stop_gradient: bool, share: float) -> None:
    method = make(symmetric=True, predictor=False, stop_gradient=stop_gradient)
    draws = torch.Generator().manual_seed(0)
    ends = [{name: torch.rand(8, 16, generator=draws) for name in method.taps.layers} for _ in range(2)]
    flat = [end[name].requires_grad_() for end in ends for name in method.taps.layers]
    found = torch.autograd.grad(method.distance(*ends), flat)
    cosines = [F.cosine_similarity(ends[0][name], ends[1][name]).mean() for name in method.taps.layers]
    expected = torch.autograd.grad(-sum(cosines) / 4, flat)  # type: ignore[arg-type]
    for mine, whole in zip(found, expected, strict=True):
        assert whole.abs().amax() > 0
        torch.testing.assert_close(mine, share * whole)


def test_terms_sum_to_the_loss() -> None:
    output = make().loss(batch(), perturbed())
    assert output.terms is not None
    torch.testing.assert_close(sum(output.terms.values()), output.loss)


# Who gets a gradient from what.


def gradients(scalar: Tensor, module: nn.Module) -> dict[str, Tensor | None]:
    named = dict(module.named_parameters())
    found = torch.autograd.grad(scalar, list(named.values()), allow_unused=True, retain_graph=True)
    return dict(zip(named, found, strict=True))


def test_invariance_gives_the_clean_branch_no_gradient_and_classification_gives_the_predictors_none() -> None:
    method = make()
    output = method.loss(batch(), perturbed())
    assert output.terms is not None
    invariance = gradients(output.terms["invariance"], method)
    classification = gradients(output.terms["classification"], method)
    clean = [name for name in invariance if ".clean." in name]
    assert len(clean) == 40  # 20 BatchNorms, two vectors each
    assert all(invariance[name] is None for name in clean)
    assert all(classification[name] is not None for name in clean)
    predictors = [name for name in invariance if name.startswith("predictors.")]
    assert len(predictors) == 4 * 5
    assert all(classification[name] is None for name in predictors)
    assert all(invariance[name] is not None for name in predictors)
    assert invariance["network.linear.weight"] is None


def test_without_stopped_gradient_invariance_moves_the_clean_branch() -> None:
    output = (method := make(stop_gradient=False)).loss(batch(), perturbed())
    assert output.terms is not None
    found = gradients(output.terms["invariance"], method)
    # All but what comes after the last tap, which is the last block's second BatchNorm.
    assert all(gradient is not None for name, gradient in found.items() if ".clean." in name)


# BatchNorm's statistics.


def tracked(method: ARAT, branch: str) -> set[int]:
    pairs = [module for module in method.network.modules() if isinstance(module, SplitBatchNorm2d)]
    assert len(pairs) == 20
    return {int(getattr(pair, branch).num_batches_tracked) for pair in pairs}


@pytest.mark.parametrize(
    ("mode", "moves", "times"), [("train", True, STEPS + 1), ("train", False, 1), ("eval", False, 1)]
)
def test_how_often_a_step_moves_the_statistics(mode: Mode, moves: bool, times: int) -> None:
    method = make(mode, moves=moves)
    method(batch())
    assert (tracked(method, "adversarial"), tracked(method, "clean")) == ({times}, {1})


def test_without_split_both_passes_move_the_same_statistics() -> None:
    method = make(split_bn=False)
    method(batch())
    norms = [module for module in method.network.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {int(norm.get_buffer("num_batches_tracked")) for norm in norms} == {2}


def test_what_the_attack_moves_are_the_adversarial_running_means() -> None:
    moving, still = make("train", moves=True), make("train")
    assert torch.equal(moving.perturb(batch()), still.perturb(batch()))
    for branch, same in (("adversarial", False), ("clean", True)):
        means = [method.network.get_buffer(f"bn1.{branch}.running_mean") for method in (moving, still)]
        assert torch.equal(*means) == same


# The regularised layers.


@pytest.mark.parametrize(
    ("name", "options", "widths", "layers"),
    [
        ("resnet18", {"width": 64}, [512] * 4, "layer4.0.bn1 layer4.0.bn2 layer4.1.bn1 layer4.1.bn2"),
        (
            "wide-resnet",
            {"depth": 34, "width": 10},
            [320] + [640] * 10,
            "block3.0.bn1 block3.0.bn2 block3.1.bn1 block3.1.bn2 block3.2.bn1 block3.2.bn2 "
            "block3.3.bn1 block3.3.bn2 block3.4.bn1 block3.4.bn2 bn",
        ),
        (
            "preact-resnet18",
            {"width": 64},
            [256] + [512] * 4,
            "layer4.0.bn1 layer4.0.bn2 layer4.1.bn1 layer4.1.bn2 bn",
        ),
        ("small-cnn-bn", {"width": 16}, [32], "8"),
    ],
)
def test_the_last_stage_is_regularised(name: str, options: dict[str, int], widths: list[int], layers: str) -> None:
    with torch.device("meta"):
        net = build_model(name, Normalise([0.5], [0.5]), in_channels=3, size=32, classes=10, **options)
        method = ARAT(net, adversary=None, targets=LabelSmoothing())
    assert method.taps.layers == tuple(layers.split())
    assert [predictor[0].in_features for predictor in method.predictors] == widths  # type: ignore[index]
    assert [predictor[0].out_features for predictor in method.predictors] == [width // 4 for width in widths]  # type: ignore[index]


@pytest.mark.parametrize(
    ("name", "options", "count"),
    [("resnet18", {"width": 64}, 11_183_562), ("wide-resnet", {"depth": 34, "width": 10}, 46_182_906)],
)
def test_a_split_network_has_the_published_number_of_parameters(name: str, options: dict[str, int], count: int) -> None:
    with torch.device("meta"):
        net = build_model(name, Normalise([0.5], [0.5]), in_channels=3, size=32, classes=10, **options)
        assert sum(parameter.numel() for parameter in split_batch_norm(net).parameters()) == count


def test_wide_residual_taps_are_what_enters_the_next_layer() -> None:
    net = network("wide-resnet", depth=16, width=1)
    taps = FeatureTaps(net, net.activations)  # type: ignore[arg-type]
    kept: dict[str, Tensor] = {}
    entered = {f"block3.{i}.bn{k}": f"block3.{i}.conv{k}" for i in (0, 1) for k in (1, 2)} | {"bn": "linear"}
    for tap, layer in entered.items():
        net.get_submodule(layer).register_forward_hook(lambda m, inputs, out, tap=tap: kept.update({tap: inputs[0]}))
    with taps.listening() as found:
        net(batch().images)
    assert found.keys() == kept.keys()
    for tap, features in found.items():
        torch.testing.assert_close(features, kept[tap] if tap == "bn" else kept[tap].mean((2, 3)))


def test_layers_can_be_named() -> None:
    method = make(layers=("layer3", "layer4.1.conv2"))
    assert [predictor[0].in_features for predictor in method.predictors] == [8, 16]  # type: ignore[index]
    kept: list[Tensor] = []
    method.network.layer3.register_forward_hook(lambda m, i, out: kept.append(out))  # type: ignore[union-attr]
    with method.taps.listening() as found:
        method.network(batch().images)
    torch.testing.assert_close(found["layer3"], kept[0].relu().mean((2, 3)))


def test_layers_may_be_named_in_any_order() -> None:
    losses = []
    for layers in (("layer3", "layer4"), ("layer4", "layer3")):
        method = make(layers=layers, predictor=False)
        losses.append(method.loss(batch(), perturbed()).loss.item())
        assert torch.isfinite(make(layers=layers).loss(batch(), perturbed()).loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_layer_that_takes_no_part_is_named() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Conv2d(3, 4, 8), nn.BatchNorm2d(4)

        def forward(self, images: Tensor) -> Tensor:
            return self.used(images).flatten(1)

    with pytest.raises(UserError, match="the layer idle takes no part"):
        make(net=Idle(), layers=("idle",))(batch())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": ["layer4.0.bn3"]}, "no layer of this network 'layer4.0.bn3'; did you mean 'layer4.0.bn"),
        ({"layers": ["pool"]}, "the layer pool has no channels"),
        ({"layers": [""]}, "no layer of this network ''"),
        ({"layers": ["layer4", "layer4"]}, "each layer is named once, got layer4, layer4"),
        ({"gamma": -1}, "gamma of at least 0, got -1"),
        ({"gamma": "fast"}, "method arat: gamma: .*'fast'"),
        ({"split_bn": "maybe"}, "method arat: split_bn: .*got 'maybe'"),
        ({"clean_batch": "dirty"}, "method arat: clean_batch: .*'textbook' or 'noised', got 'dirty'"),
        ({"split_bn": False, "deploy_branch": "clean"}, "deploy_branch clean needs split_bn"),
        ({"clean_batch": "noised"}, "clean_batch noised needs an Linf threat.*l2:0.5"),
        ({"momentum": 1}, "no option of method arat 'momentum'"),
    ],
)
def test_mistakes_are_named(options: dict[str, Any], message: str) -> None:
    adversary = Adversary(PGD(L2(0.5), steps=1))
    with pytest.raises(UserError, match=message):
        build_method("arat", network(), adversary=adversary, targets=LabelSmoothing(), **options)


@pytest.mark.parametrize("adversary", [None, Adversary(APGD(Linf(EPS), steps=1))])
def test_noise_without_pgd_is_refused(adversary: Adversary | None) -> None:
    with pytest.raises(UserError, match=r"^AR-AT: clean_batch noised needs training against PGD; .*take textbook$"):
        ARAT(network(), adversary=adversary, targets=LabelSmoothing(), clean_batch="noised")


def test_a_network_without_activations_needs_names() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4))
    with pytest.raises(UserError, match="no BatchNorm2d to split; set method.split_bn to false"):
        make(net=plain)
    with pytest.raises(UserError, match="name them in method.layers"):
        make(net=plain, split_bn=False)
    method = make(net=plain, split_bn=False, layers=("0",))
    assert torch.isfinite(method(batch()).loss)


# The weights of the two cross-entropies.


def test_the_balance_is_the_clean_branchs_accuracy_on_training_images() -> None:
    method = make(net=network(width=4))
    guessing = method.loss(batch(), perturbed()).scalars
    assert guessing is not None and float(guessing["alpha"]) == 0.25  # of 4 classes
    draws = torch.Generator().manual_seed(0)
    for pair in method.network.modules():
        if isinstance(pair, SplitBatchNorm2d):
            for name, tensor in pair.clean.state_dict().items():
                if name != "num_batches_tracked":
                    tensor.uniform_(0.2 if name == "running_var" else -1, 1, generator=draws)
    batches = [batch(seed, 512) for seed in range(4)]
    right = {}
    for branch in get_args(Branch):
        reference = copy.deepcopy(method.network).eval()
        with using_branch(reference, branch), torch.no_grad():
            right[branch] = sum(int((reference(b.images).argmax(1) == b.labels).sum()) for b in batches[:2])
    assert right["clean"] != right["adversarial"]
    statistics = copy.deepcopy(method.state_dict())
    method.after_epoch(lambda: iter(batches))
    assert float(method.balance) == pytest.approx(right["clean"] / 1024)  # the images of two batches
    others = {name: tensor for name, tensor in method.state_dict().items() if name != "balance"}
    assert all(torch.equal(tensor, statistics[name]) for name, tensor in others.items())
    scalars = method.loss(batch(), perturbed()).scalars
    assert scalars is not None and float(scalars["alpha"]) == float(method.balance)


# The public code's noise.


def test_noised_batches_differ_and_nothing_is_written_in_place() -> None:
    examples = batch()
    before = examples.images.clone()
    textbook, noised = make(), make(clean_batch="noised")
    assert textbook.clean_images(examples) is examples.images
    clean = noised.clean_images(examples)
    assert 0.5 * EPS < (clean - before).abs().amax() <= EPS
    assert clean.amin() < 0 and clean.amax() > 1  # not clipped, as the public code's is not
    assert torch.equal(noised.clean_images(examples), clean)  # the same at each call in a step
    attacked = noised.perturb(examples)
    assert (attacked - clean).abs().amax() <= EPS
    assert EPS < (attacked - before).abs().amax() <= 2 * EPS  # what the textbook's never are
    assert attacked.amin() >= 0 and attacked.amax() <= 1
    assert (textbook.perturb(examples) - before).abs().amax() <= EPS
    losses = [method.loss(examples, attacked).loss.item() for method in (textbook, noised)]
    assert losses[0] != losses[1]
    assert torch.equal(examples.images, before)
    noised.before_step(0.1, torch.Generator().manual_seed(8))
    assert not torch.equal(noised.clean_images(examples), clean)


# What is shipped.


def trained(**options: Any) -> ARAT:
    method = make(**options)
    for seed in range(2):
        method(batch(seed)).loss.backward()
        with torch.no_grad():
            for parameter in method.parameters():
                if parameter.grad is not None:
                    parameter.sub_(0.01 * parameter.grad)
    return method


@pytest.mark.parametrize("split_bn", [True, False])
def test_the_deployed_network_is_plain_and_bit_equal(split_bn: bool) -> None:
    method = trained(split_bn=split_bn)
    deployed = method.deployed().eval()
    assert deployed.state_dict().keys() == network().state_dict().keys()
    assert [type(module) for module in deployed.modules()] == [type(module) for module in network().modules()]
    assert not any(module._forward_hooks for module in deployed.modules())
    method.eval()
    assert torch.equal(deployed(batch().images), method.network(batch().images))
    assert torch.equal(method.clean_logits(batch().images), deployed(batch().images))
    assert any(module._forward_hooks for module in method.network.modules())  # it goes on training


def test_the_clean_branch_can_be_deployed() -> None:
    method = trained(deploy_branch="clean")
    deployed = method.deployed().eval()
    method.eval()
    with using_branch(method.network, "clean"):
        assert torch.equal(deployed(batch().images), method.network(batch().images))
    assert not torch.equal(deployed(batch().images), method.network(batch().images))


def test_split_and_merge_are_inverse() -> None:
    net = network("wide-resnet", depth=10, width=1).eval()
    merged = merge_batch_norm(split_batch_norm(net), "clean")
    assert torch.equal(merged(batch().images), net(batch().images))
    norm = split_batch_norm(nn.BatchNorm2d(3))
    assert isinstance(norm, SplitBatchNorm2d) and norm.num_features == 3
    assert norm.clean.weight is not norm.adversarial.weight


# Among others: compiled, distributed, wrapped.


def test_taps_survive_compiling() -> None:
    net = network()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    plain = compiled(batch().images)
    taps = FeatureTaps(net, net.activations)  # type: ignore[arg-type]
    again = torch.compile(net, backend="eager", fullgraph=True)
    torch._dynamo.reset()
    net.eval()
    with taps.listening() as expected:
        logits = net(batch().images)
    before = again(batch().images)  # compiled while nobody listens
    with taps.listening() as found:
        after = again(batch().images)
    assert torch.equal(before, logits) and torch.equal(after, logits) and plain.shape == logits.shape
    assert found.keys() == expected.keys() and len(found) == 4
    assert all(torch.equal(found[layer], expected[layer]) for layer in found)


def test_the_loss_is_the_same_under_ddp(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        alone, method = make(), make()
        wrapped = DistributedDataParallel(method)
        expected, output = alone(batch()), wrapped(batch())
        torch.testing.assert_close(output.loss, expected.loss)
        output.loss.backward()
        expected.loss.backward()
        for mine, theirs in zip(method.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad)
    finally:
        dist.destroy_process_group()


def in_one_of_two(rank: int, rendezvous: str) -> None:
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    wrapped, alone = DistributedDataParallel(make()), [make(), make()]
    wrapped(batch(rank)).loss.backward()
    for seed, method in enumerate(alone):
        method(batch(seed)).loss.backward()
    each = (wrapped.module.parameters(), *(method.parameters() for method in alone))
    for mine, first, second in zip(*each, strict=True):
        torch.testing.assert_close(mine.grad, (first.grad + second.grad) / 2)
    means = [method.network.get_buffer("bn1.clean.running_mean") for method in (wrapped.module, alone[rank])]
    assert tracked(wrapped.module, "clean") == {1} and torch.equal(*means)
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_share_the_gradient(tmp_path: Path) -> None:
    spawn(in_one_of_two, (f"file://{tmp_path}/rendezvous",), nprocs=2)


def test_the_loss_can_be_compiled() -> None:
    torch._dynamo.reset()
    alone, method = (make(net=network("wide-resnet", depth=10, width=1)) for _ in range(2))
    compiled = torch.compile(method.loss, backend="aot_eager")
    for seed in (5, 6):
        expected, output = alone.loss(batch(), perturbed(seed)), compiled(batch(), perturbed(seed))
        torch.testing.assert_close(output.loss, expected.loss)
        output.loss.backward()
        expected.loss.backward()
    for (name, mine), theirs in zip(method.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5, msg=name)
    for (name, buffer), other in zip(method.named_buffers(), alone.buffers(), strict=True):
        torch.testing.assert_close(buffer, other, msg=name)


def test_copies_listen_to_themselves() -> None:
    method = make()
    other = copy.deepcopy(method)
    with other.taps.listening() as found, method.taps.listening() as mine:
        other.network(batch().images)
    assert len(found) == 4 and not mine
    assert not any(module._forward_hooks for module in without_taps(copy.deepcopy(method.network)).modules())


@pytest.mark.parametrize("wrapper", ["awp", "ema", "swa"])
def test_wrappers_go_around_it(wrapper: str) -> None:
    method: Method
    if wrapper == "awp":
        method = WeightPerturbation(make(), WeightPerturbationConfig())
    elif wrapper == "ema":
        method = WeightAveraging(make(), WeightAveragingConfig(kind="ema"))
    else:
        method = WeightAveraging(make(), WeightAveragingConfig(kind="swa", batches=1))
    optimizer = torch.optim.SGD(method.parameters(), lr=0.01)
    for seed in range(2):
        method.before_step(0.0, Generator().manual_seed(seed))
        output = method(batch(seed))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        method.after_step()
    method.after_epoch(lambda: iter([batch()]))
    assert torch.isfinite(output.loss)
    deployed = method.deployed()
    assert deployed.state_dict().keys() == network().state_dict().keys()
    assert all(torch.isfinite(tensor).all() for tensor in deployed.state_dict().values())


def test_the_predictor_is_a_bottleneck_of_a_quarter() -> None:
    predictor = Predictor(16)
    kinds = [type(layer) for layer in predictor]
    assert kinds == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    assert sum(parameter.numel() for parameter in predictor.parameters()) == 16 * 4 + 2 * 4 + 4 * 16 + 16
