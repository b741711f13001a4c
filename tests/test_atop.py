"""AToP against its equation, term by term; and whole runs of it: three phases, stops, parts from other runs."""

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import redan
from redan.attacks.pgd import PGD
from redan.data.pipeline import to_float
from redan.data.registry import load_dataset
from redan.data.types import Batch, Facts
from redan.errors import UserError
from redan.methods.atop import AToP, AToPConfig, StageConfig
from redan.methods.base import Adversary, OptimizerConfig, Phase, ScheduleConfig
from redan.methods.targets import LabelSmoothing
from redan.models.norms import Normalise
from redan.models.purified import Purified
from redan.models.purifiers.base import Plain
from redan.models.purifiers.discriminator import PatchDiscriminator
from redan.models.purifiers.masked_autoencoder import MaskedAutoencoder
from redan.models.purifiers.registry import build_purifier
from redan.models.random_transforms import Draw, build_transform
from redan.models.registry import build_model
from redan.recipes.build import build
from redan.recipes.schema import Recipe, load_recipe
from redan.run import STATE, take_over
from redan.tensors import load_tensors, save_tensors
from redan.threats import Linf
from redan.training import trainer

EPS = 0.1
NONE = StageConfig(epochs=0, optimizer=OptimizerConfig(lr=0.1))
PLANNED = Phase("training", 5, OptimizerConfig(lr=0.1), ScheduleConfig())
INPAINTING: dict[str, Any] = {"width": 4, "halvings": 1, "dilations": 1, "attention": False}
AUTOENCODER: dict[str, Any] = {
    "patch": 2,
    "width": 8,
    "depth": 1,
    "heads": 2,
    "decoder_width": 8,
    "decoder_depth": 1,
    "decoder_heads": 2,
}


def batch(seed: int = 0, n: int = 6) -> Batch:
    draws = torch.Generator().manual_seed(seed)
    images = torch.rand(n, 1, 8, 8, generator=draws)
    return Batch(images, torch.randint(4, (n,), generator=draws), torch.arange(n))


def perturbed(seed: int = 5) -> Tensor:
    return Linf(EPS).random_start(batch().images, torch.Generator().manual_seed(seed))


def make(
    phase: str = "finetuning",
    *,
    transform: str = "rt2",
    purifier: str = "inpainting",
    critic: bool = True,
    smoothing: float = 0.0,
    attack: PGD | None = None,
    **config: Any,
) -> AToP:
    """A tiny pipeline with BatchNorm in its classifier, in a phase, before a step."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        classifier = build_model("small-cnn-bn", Normalise([0.5], [0.3]), in_channels=1, size=8, classes=4, width=3)
        options = INPAINTING if purifier == "inpainting" else AUTOENCODER
        parts = build_purifier(purifier, channels=1, size=8, **options), classifier
        pipeline = Purified(build_transform(transform, size=8, sigma=0.0 if transform == "rt1" else 0.25), *parts)
        discriminator = PatchDiscriminator(channels=1, size=8, width=4) if critic else None
        classifier(batch(9, 30).images)  # statistics of its own
    attack = attack or PGD(Linf(EPS), 1, EPS, start="image", drop_broken=False)
    settings = AToPConfig(**({"classifier_training": NONE, "pretraining": NONE} | config))
    method = AToP(
        pipeline,
        adversary=Adversary(attack, precision="float32"),
        targets=LabelSmoothing(smoothing),
        discriminator=discriminator,
        config=settings,
    )
    stages = method.phases(PLANNED)
    method.enter(Phase(phase, 1, PLANNED.optimizer, PLANNED.schedule))
    method.train()
    begins = sum(stage.epochs for stage in stages[:-1]) if phase == "finetuning" else 0
    method.before_step(float(begins), torch.Generator().manual_seed(7))
    return method


def listen(method: AToP) -> list[Draw]:
    """Every draw of the transform from now on, those of the attack's copies among them."""
    heard: list[Draw] = []
    real = method.pipeline.transform.sample

    def sample(*args: Any) -> Draw:
        heard.append(real(*args))
        return heard[-1]

    method.pipeline.transform.sample = sample  # type: ignore[assignment, method-assign]
    return heard


def same_draw(first: Draw, second: Draw) -> bool:
    return torch.equal(first.noise, second.noise) and torch.equal(first.holes, second.holes)


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(module: nn.Module, before: dict[str, Tensor]) -> bool:
    after = module.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def gradients(module: nn.Module) -> list[Tensor | None]:
    return [parameter.grad for parameter in module.parameters()]


# The loss.


def by_hand(
    method: AToP,
    draw: Draw,
    adversarial: Tensor | None = None,
    *,
    target: Tensor,
    live: bool = True,
    weight: float = 0.1,
    smoothing: float = 0.0,
) -> tuple[float, list[Tensor], list[Tensor]]:
    """Equation 9 for one draw: the loss, and its gradients in the purifier and in the discriminator."""
    pipeline, critic = copy.deepcopy(method.pipeline), copy.deepcopy(method.discriminator)
    g, f = pipeline.purifier, pipeline.classifier
    holes = [m.expand(len(target), 1, 8, 8) for m in draw.holes]

    def views(x: Tensor) -> list[Tensor]:
        noisy = (x + draw.noise).clamp(0, 1)
        return [(1 - m) * noisy + 0.5 * m for m in holes]

    distance = torch.zeros(())
    for seen, m in zip(views(target), holes, strict=True):
        for attempt in g.attempts(seen, m):
            error = 2 * (attempt - target)
            distance = distance + (error.abs() if g.criterion == "l1" else error**2).mean() / len(holes)
    loss_g, loss_d = distance, torch.zeros(())
    if critic is not None:
        made, m = torch.cat([g(seen, m) for seen, m in zip(views(target), holes, strict=True)]), torch.cat(holes)
        real, fake = critic(torch.cat([target] * len(holes)), m), critic(made.detach(), m)
        loss_d = (1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()
        if live:
            loss_g = loss_g - critic(made, m).mean()
    if adversarial is not None:
        pieces = [g(seen, m) for seen, m in zip(views(adversarial), holes, strict=True)]
        whole = pieces[0] if len(holes) == 1 else sum(m * piece for m, piece in zip(holes, pieces, strict=True))
        loss_g = loss_g + weight * F.cross_entropy(f(whole), batch().labels, label_smoothing=smoothing)
    of_g = torch.autograd.grad(loss_g, list(g.parameters()), retain_graph=True)
    of_d = [] if critic is None else torch.autograd.grad(loss_d, list(critic.parameters()))
    return (loss_g + loss_d).item(), list(of_g), list(of_d)


def check(method: AToP, given: Tensor, **reference: Any) -> None:
    """The method's loss and gradients on this draw and by hand; the classifier has none."""
    heard, twin = listen(method), copy.deepcopy(method)
    before = snapshot(method.pipeline.classifier)
    output = method.loss(batch(), given)
    output.loss.backward()
    (draw,) = heard
    loss, of_g, of_d = by_hand(twin, draw, **reference)
    assert output.loss.item() == pytest.approx(loss, rel=1e-6, abs=1e-6)
    for mine, theirs in zip(gradients(method.pipeline.purifier), of_g, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(gradients(method.discriminator) if method.discriminator else [], of_d, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    assert any(gradient.abs().max() > 1e-4 for gradient in of_g)
    assert set(gradients(method.pipeline.classifier)) == {None} and same(method.pipeline.classifier, before)


@pytest.mark.parametrize("transform", ["rt1", "rt2", "rt3"])
@pytest.mark.parametrize("purifier", ["inpainting", "masked-autoencoder"])
@pytest.mark.parametrize("critic", [True, False])
def test_the_loss_of_finetuning_is_equation_9(transform: str, purifier: str, critic: bool) -> None:
    method = make(transform=transform, purifier=purifier, critic=critic)
    check(method, perturbed(), adversarial=perturbed(), target=perturbed())


@pytest.mark.parametrize("transform", ["rt2", "rt3"])
@pytest.mark.parametrize("live", [True, False])
def test_l_org_may_be_of_clean_images(transform: str, live: bool) -> None:
    method = make(transform=transform, l_org_target="clean", gan_gradient="live" if live else "detached")
    check(method, perturbed(), adversarial=perturbed(), target=batch().images, live=live)


def test_where_nobody_attacks_the_clean_pass_is_the_only_one() -> None:
    method = make(l_org_target="clean", adversary="none")
    calls: list[int] = []
    method.pipeline.purifier.register_forward_hook(lambda *_: calls.append(1))
    examples = batch()
    output = method(examples)
    assert calls == []  # the loss asks for all attempts, and asks once
    assert output.adversarial_logits is not None
    check(
        make(l_org_target="clean", adversary="none"), batch().images, adversarial=batch().images, target=batch().images
    )


@pytest.mark.parametrize("weight", [0.05, 3.0])
def test_the_weight_is_of_the_cross_entropy(weight: float) -> None:
    check(
        make(weight=weight, smoothing=0.2),
        perturbed(),
        adversarial=perturbed(),
        target=perturbed(),
        weight=weight,
        smoothing=0.2,
    )


def test_at_weight_0_the_cross_entropy_is_logged_and_moves_nothing() -> None:
    method = make(weight=0.0)
    check(method, perturbed(), target=perturbed())
    output = make(weight=0.0).loss(batch(), perturbed())
    assert output.adversarial_logits is not None and not output.adversarial_logits.requires_grad
    assert output.scalars is not None and output.scalars["loss_classification"] > 0


@pytest.mark.parametrize(("since", "counts"), [(0.0, False), (2.9, False), (3.0, True), (4.5, True)])
@pytest.mark.parametrize("stages", [0, 2])
def test_the_cross_entropy_may_count_later(since: float, counts: bool, stages: int) -> None:
    stage = NONE.model_copy(update={"epochs": stages})
    method = make(cross_entropy_from=3.0, classifier_training=stage, pretraining=stage)
    method.before_step(2 * stages + since, torch.Generator().manual_seed(7))
    output = method.loss(batch(), perturbed())
    assert (output.adversarial_logits is not None) == counts == ("loss_classification" in (output.scalars or {}))
    method = make(cross_entropy_from=3.0, classifier_training=stage, pretraining=stage)
    method.before_step(2 * stages + since, torch.Generator().manual_seed(7))
    check(method, perturbed(), adversarial=perturbed() if counts else None, target=perturbed())


@pytest.mark.parametrize("transform", ["rt1", "rt2", "rt3"])
@pytest.mark.parametrize("purifier", ["inpainting", "masked-autoencoder"])
@pytest.mark.parametrize("critic", [True, False])
def test_pretraining_is_l_org_of_clean_images(transform: str, purifier: str, critic: bool) -> None:
    method = make("purifier", transform=transform, purifier=purifier, critic=critic)
    examples = batch()
    assert method.perturb(examples) is examples.images
    check(method, examples.images, target=examples.images)
    assert method.loss(examples, examples.images).adversarial_logits is None


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_first_phase_is_standard_training_of_the_bare_classifier(smoothing: float) -> None:
    method, examples = make("classifier", smoothing=smoothing), batch()
    classifier = copy.deepcopy(method.pipeline.classifier)
    output = method(examples)
    output.loss.backward()
    assert classifier.training
    loss = F.cross_entropy(classifier(examples.images), examples.labels, label_smoothing=smoothing)
    loss.backward()
    assert output.loss.item() == pytest.approx(loss.item(), abs=1e-6)
    for mine, theirs in zip(gradients(method.pipeline.classifier), gradients(classifier), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    assert set(gradients(method.pipeline.purifier)) == {None}
    assert output.clean_logits is not None and output.adversarial_logits is None


def test_who_learns_from_which_hinge_term() -> None:
    found = {}
    for name, options in {
        "live": {},
        "detached": {"gan_gradient": "detached"},
        "alone": {"critic": False},
    }.items():
        method = make(**options)  # type: ignore[arg-type]
        method.loss(batch(), perturbed()).loss.backward()
        found[name] = method
    # The discriminator learns the same, whether or not its verdict reaches the purifier; its own loss never does.
    for mine, theirs in zip(*(gradients(found[k].discriminator) for k in ("live", "detached")), strict=True):  # type: ignore[arg-type]
        assert mine is not None and theirs is not None and torch.equal(mine, theirs)
    for one, other, apart in zip(
        *(gradients(found[k].pipeline.purifier) for k in ("alone", "detached", "live")), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
        assert apart is not None and one is not None
    first, second = (gradients(found[k].pipeline.purifier)[0] for k in ("alone", "live"))
    assert first is not None and second is not None and (first - second).abs().max() > 1e-5
    assert all(p.requires_grad for p in found["live"].discriminator.parameters())  # type: ignore[union-attr]


def test_in_bfloat16_the_loss_is_close_and_the_critic_exact() -> None:
    exact, rounded = make(), make()
    expected = exact.loss(batch(), perturbed())
    kinds: set[torch.dtype] = set()
    rounded.discriminator.register_forward_hook(lambda m, inputs, out: kinds.update({out.dtype, inputs[0].dtype}))  # type: ignore[union-attr]
    with torch.autocast("cpu", torch.bfloat16):
        output = rounded.loss(batch(), perturbed())
    output.loss.backward()
    assert kinds == {torch.float32}
    assert 0 < abs(output.loss.item() - expected.loss.item()) < 0.02 * expected.loss.item()


# The adversary.


def fgsm(forward: Any, examples: Batch) -> Tensor:
    leaf = examples.images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(forward(leaf), examples.labels, reduction="sum"), leaf)
    return (examples.images + EPS * gradient.sign()).clamp(0, 1)


@pytest.mark.parametrize("transform", ["rt1", "rt2", "rt3"])
def test_end_to_end_is_fgsm_on_the_draw_of_the_loss(transform: str) -> None:
    method, examples = make(transform=transform), batch()
    before = snapshot(method)
    heard = listen(method)
    found = method.perturb(examples)
    attacked = heard[-1]
    assert same(method, before) and not found.requires_grad and method.pipeline.purifier.training
    method.loss(examples, found)
    assert same_draw(heard[-1], attacked)
    twin = copy.deepcopy(method.pipeline).eval()
    expected = fgsm(lambda x: twin.at(x, [attacked]), examples)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    if transform != "rt3":  # what the draw hides is not worth attacking
        hidden = attacked.holes[0] == 1
        assert torch.equal(found[hidden], examples.images[hidden])
    assert not torch.allclose(found, fgsm(twin.classifier, examples), atol=1e-3)


@pytest.mark.parametrize("transform", ["rt2", "rt3"])
def test_the_public_codes_adversary_sees_the_bare_classifier(transform: str) -> None:
    method, examples = make(transform=transform, adversary="classifier"), batch()
    heard = listen(method)
    found = method.perturb(examples)
    assert not heard  # no purifier, no noise and no mask in it
    torch.testing.assert_close(found, fgsm(copy.deepcopy(method.pipeline.classifier), examples), rtol=0, atol=1e-6)


def test_no_adversary_gives_the_images_themselves() -> None:
    examples = batch()
    assert make(adversary="none").perturb(examples) is examples.images
    for phase in ("classifier", "purifier"):
        assert make(phase).perturb(examples) is examples.images


def test_each_step_has_a_draw_of_its_own_and_gives_torchs_randomness_back() -> None:
    method, heard_steps = make(), []
    for seed in (7, 8, 7):
        heard = listen(method)
        method.before_step(0.0, torch.Generator().manual_seed(seed))
        before = torch.get_rng_state()
        method(batch())
        assert torch.equal(torch.get_rng_state(), before)
        heard_steps.append(heard[-1])
    assert same_draw(heard_steps[0], heard_steps[2]) and not same_draw(heard_steps[0], heard_steps[1])


def test_further_steps_of_the_attack_draw_anew() -> None:
    method = make(attack=PGD(Linf(EPS), 3, EPS / 2, start="image", drop_broken=False))
    heard = listen(method)
    found = method.perturb(batch())
    first, second, third = heard[-3:]
    assert not same_draw(first, second) and not same_draw(second, third)
    method.loss(batch(), found)
    assert same_draw(heard[-1], first)


# What a phase trains, and what it leaves.


def test_the_phases() -> None:
    stage = StageConfig(epochs=4, optimizer=OptimizerConfig(lr=0.3), schedule=ScheduleConfig(name="cosine"))
    first, second, third = make(classifier_training=stage, pretraining=stage).phases(PLANNED)
    assert first == Phase("classifier", 4, stage.optimizer, stage.schedule)
    assert second == Phase("purifier", 4, stage.optimizer, stage.schedule)
    assert third == Phase("finetuning", 5, PLANNED.optimizer, PLANNED.schedule)
    assert make(pretraining=stage).phases(PLANNED) == [second, third]
    assert make(classifier_training=stage).phases(PLANNED) == [first, third]
    assert make().phases(PLANNED) == [third]


@pytest.mark.parametrize("phase", ["classifier", "purifier", "finetuning"])
@pytest.mark.parametrize("critic", [True, False])
def test_a_phase_trains_what_it_is_for_and_nothing_else(phase: str, critic: bool) -> None:
    method = make(phase, critic=critic)
    before = snapshot(method)
    trained = {"network.classifier"} if phase == "classifier" else {"network.purifier", "discriminator"}
    trained -= set() if critic else {"discriminator"}
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    for seed in range(2):
        method.train()
        method.before_step(0.0, torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        method(batch(seed)).loss.backward()
        optimizer.step()
    for name, parameter in method.named_parameters():
        learns = any(name.startswith(f"{part}.") for part in trained)
        assert parameter.requires_grad == learns == (parameter.grad is not None), name
        assert torch.equal(parameter, before[name]) != learns, name
    frozen = [m for m in method.pipeline.classifier.modules() if isinstance(m, nn.BatchNorm2d)]
    assert frozen and all(m.training == (phase == "classifier") for m in frozen)
    still = {name: tensor for name, tensor in before.items() if name.startswith("network.classifier.")}
    after = method.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in still.items()) == (phase != "classifier")


def test_validation_looks_at_what_the_phase_trains() -> None:
    for phase in ("classifier", "purifier", "finetuning"):
        method = make(phase)
        first = phase == "classifier"
        assert method.validated() is (method.pipeline.classifier if first else method.pipeline)
        assert method.selects_by == ("robust" if phase == "finetuning" else "clean")
        assert make(phase, adversary="none").selects_by == "clean"
        assert method.deployed() is method.trained() is method.pipeline
        before, x = snapshot(method), batch().images
        with torch.random.fork_rng():
            torch.manual_seed(2)
            logits = method.clean_logits(x)
            torch.manual_seed(2)
            expected = copy.deepcopy(method.validated()).eval()(x)
        torch.testing.assert_close(logits, expected)
        assert same(method, before)


def test_only_a_pipeline_is_trained_so_and_only_in_evaluation_mode() -> None:
    parts: dict[str, Any] = {"targets": LabelSmoothing(), "discriminator": None, "config": make().config}
    with pytest.raises(UserError, match="AToP trains a purifier before a classifier, not a plain network"):
        AToP(nn.Flatten(), adversary=None, **parts)
    training = Adversary(PGD(Linf(EPS), 1), mode="train")
    with pytest.raises(UserError, match="AToP attacks in evaluation mode, .*; set attack.mode to eval") as error:
        AToP(make().pipeline, adversary=training, **parts)
    assert "\n" not in str(error.value)


def test_without_an_adversary_images_stay_clean() -> None:
    of = make()
    method = AToP(of.pipeline, adversary=None, targets=LabelSmoothing(), discriminator=None, config=of.config)
    method.enter(Phase("finetuning", 1, PLANNED.optimizer, PLANNED.schedule))
    examples = batch()
    assert method.perturb(examples) is examples.images


def test_the_loss_is_the_same_under_ddp_in_every_phase(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        method = make()
        for phase in ("classifier", "purifier", "finetuning"):
            stage = Phase(phase, 1, PLANNED.optimizer, PLANNED.schedule)
            alone = copy.deepcopy(method)
            for one in (method, alone):
                one.enter(stage)
                one.zero_grad()
            alone._search, alone._bare = make()._search, make()._bare
            wrapped = DistributedDataParallel(method)
            for seed in range(2):
                outputs = []
                for one, forward in ((method, wrapped), (alone, alone)):
                    one.train()
                    one.before_step(0.0, torch.Generator().manual_seed(seed))
                    attacked = batch(seed).images if phase != "finetuning" else perturbed(seed)
                    outputs.append(forward(batch(seed), attacked))
                    outputs[-1].loss.backward()
                torch.testing.assert_close(outputs[0].loss, outputs[1].loss)
            for mine, theirs in zip(gradients(method), gradients(alone), strict=True):
                torch.testing.assert_close(mine, theirs)
    finally:
        dist.destroy_process_group()


# Recipes.


DIGITS = Facts(1, 8, tuple("0123456789"), (0.3,), (0.4,))
ADAM: dict[str, Any] = {"name": "adam", "lr": 2e-3, "momentum": 0.5, "weight_decay": 0.0}
# Clipping, so that what is left of an earlier phase would show; three validations, so that best and last differ.
TINY: dict[str, Any] = {
    "name": "tiny",
    "data": {"name": "digits", "train_samples": 200, "validation_samples": 50},
    "model": {"name": "small-cnn-bn", "width": 4},
    "threat": "linf:0.15",
    "method": "atop",
    "purification": {
        "purifier": {"name": "inpainting", **INPAINTING},
        "discriminator": 4,
        "classifier_training": {"epochs": 2, "optimizer": {"lr": 0.1}},
        "pretraining": {"epochs": 2, "optimizer": ADAM},
    },
    "attack": {"steps": 1, "step_size": 0.15},
    "optimizer": ADAM,
    "epochs": 3,
    "validation": {"steps": 2},
    "batch_size": 50,
    "gradient_clip": 0.5,
}
STEPS = 4  # an epoch


def changed(**purification: Any) -> dict[str, Any]:
    return TINY | {"purification": TINY["purification"] | purification}


def written(folder: Path, recipe: dict[str, Any]) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def test_a_recipe_with_a_purifier_reads_back(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, TINY))
    assert Recipe.model_validate(json.loads(json.dumps(recipe.resolved()))) == recipe
    recipe.save(tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path) == recipe and load_recipe(tmp_path).resolved() == recipe.resolved()
    purification = recipe.resolved()["purification"]
    assert purification["transform"] == {"name": "rt2", "sigma": 0.25, "missing": 0.25, "cells": 8, "masks": "image"}
    assert purification["purifier"] == {"name": "inpainting", **INPAINTING}
    published = {"weight": 0.1, "adversary": "end_to_end", "l_org_target": "adversarial", "cross_entropy_from": 0.0}
    assert published.items() <= purification.items() and purification["gan_gradient"] == "live"


def test_its_parts_are_overridden(tmp_path: Path) -> None:
    short = written(tmp_path, changed(transform="rt3", purifier="inpainting"))
    overrides = {
        "purification.purifier.width": 8,
        "purification.transform.sigma": 0.1,
        "purification.pretraining.optimizer.lr": 0.5,
        "purification.votes": 3,
    }
    found = load_recipe(short, overrides).purification
    assert found is not None and found.transform.name == "rt3" and found.transform.options["sigma"] == 0.1
    assert found.purifier.options == {"width": 8, "halvings": 2, "dilations": 5, "attention": True}
    assert found.pretraining.optimizer.lr == 0.5 and found.votes == 3
    other = load_recipe(short, {"purification.purifier": {"name": "masked-autoencoder", "patch": 1}}).purification
    assert other is not None and other.purifier.options["patch"] == 1 and other.purifier.options["width"] == 192
    assert load_recipe(short, {"purification.discriminator": None}).resolved()["purification"]["discriminator"] is None


def test_its_numbers_may_be_fractions(tmp_path: Path) -> None:
    given = {"weight": "1/10", "cross_entropy_from": "1/3", "transform.sigma": "8/255", "transform.missing": "1 / 4"}
    short = written(tmp_path, changed(transform="rt2"))
    recipe = load_recipe(short, {f"purification.{key}": value for key, value in given.items()})
    found = recipe.purification
    assert found is not None and (found.weight, found.cross_entropy_from) == (0.1, 1 / 3)
    assert found.transform.options == {"sigma": 8 / 255, "missing": 0.25, "cells": 8, "masks": "image"}
    method = build(recipe, DIGITS)
    assert isinstance(method, AToP) and method.pipeline.transform.sigma == 8 / 255


def test_a_purifier_of_ones_own_may_come_trained() -> None:
    none = {"epochs": 0, "optimizer": ADAM}
    recipe = Recipe.model_validate(changed(purifier="package.module:function", pretraining=none))
    assert recipe.purification is not None and recipe.purification.pretraining.epochs == 0


@pytest.mark.parametrize("name", ["atop-code-cifar10-mini", "atop-code-cifar10-resnet18"])
def test_the_public_codes_recipes_are_as_it_is(name: str) -> None:
    recipe = load_recipe(name)
    found = recipe.purification
    assert found is not None and found.transform.name == "rt2" and found.transform.options["masks"] == "batch"
    code = {"adversary": "classifier", "weight": 0.05, "l_org_target": "clean", "gan_gradient": "detached"}
    assert code.items() <= found.model_dump().items()
    # Its epochs are 625 steps of 8 images, and the first two of them are without the cross-entropy.
    images = recipe.data.train_samples or 50_000 - recipe.data.validation_samples
    steps = images // recipe.batch_size
    first = next(step for step in range(steps * recipe.epochs) if step / steps >= found.cross_entropy_from)
    assert abs(first * recipe.batch_size - 2 * 625 * 8) < recipe.batch_size


def test_the_autoencoder_on_imagenette_is_base_and_its_patches_are_cells() -> None:
    recipe = load_recipe("atop-ae-imagenette-resnet34")
    found, size = recipe.purification, recipe.data.crop
    assert found is not None and size is not None
    with torch.device("meta"):
        purifier = build_purifier(found.purifier.name, channels=3, size=size, **found.purifier.options)
    assert isinstance(purifier, MaskedAutoencoder) and len(purifier.decoder) == 8 + 2
    # A ViT-B/16 without head has 85 798 656, of which 197 * 768 positions are not learnt here.
    encoder = [purifier.embed, purifier.encoder, purifier.norm]
    learnt = sum(parameter.numel() for part in encoder for parameter in part.parameters()) + purifier.summary.numel()
    assert learnt == 85_798_656 - 197 * 768
    transform = build_transform(found.transform.name, size=size, **found.transform.options)
    holes = transform.sample(torch.zeros(4, 3, size, size)).holes[0]
    whole, touched = -F.max_pool2d(-holes, purifier.patch), F.max_pool2d(holes, purifier.patch)
    assert torch.equal(whole, touched) and touched.shape[2:] == (8, 8)  # a patch is missing or seen, never half


def test_what_a_recipe_describes_is_built() -> None:
    config = {"transform": {"name": "rt3", "cells": 4, "masks": "batch"}, "votes": 2, "weight": 0.3}
    method = build(Recipe.model_validate(changed(**config)), DIGITS)
    assert isinstance(method, AToP) and method.pipeline.votes == 2 and method.config.weight == 0.3
    transform = method.pipeline.transform
    assert (transform.cells, transform.masks, transform.views, transform.size) == (4, "batch", 4, 8)
    assert method.adversary is not None and isinstance(method.adversary.attack, PGD)
    assert method.adversary.attack.start == "image" and not method.adversary.attack.drop_broken
    again = build(Recipe.model_validate(changed()), DIGITS)
    other = build(Recipe.model_validate(TINY | {"seed": 1}), DIGITS)
    plain = build(Recipe.model_validate(TINY | {"method": "standard", "purification": None}), DIGITS)
    assert isinstance(again, AToP) and isinstance(other, AToP)
    assert same(again.pipeline.classifier, snapshot(plain.deployed()))  # a purifier before it changes no classifier
    assert same(again.pipeline.purifier, snapshot(method.pipeline.purifier))
    assert not same(other.pipeline.purifier, snapshot(method.pipeline.purifier))
    without = build(Recipe.model_validate(changed(discriminator=None)), DIGITS)
    assert isinstance(without, AToP) and without.discriminator is None
    assert same(without.pipeline.purifier, snapshot(method.pipeline.purifier))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"purification": None}, "method atop trains a purifier; describe it under purification"),
        ({"method": "trades"}, "method trades trains no purifier; leave purification out (it goes with: atop)"),
        ({"weight_averaging": {}}, "a purifier is trained without weight_perturbation and weight_averaging; leave"),
        ({"weight_perturbation": {}}, "a purifier is trained without weight_perturbation and weight_averaging"),
        (changed(purifier="inpaintin"), "no purifier 'inpaintin'; did you mean 'inpainting'?"),
        (changed(purifier={"width": 4}), "recipe tiny: the key 'purification.purifier.name' is missing"),
        (
            changed(purifier={"name": "inpainting", "widht": 4}),
            "no option of purifier inpainting 'widht'; did you mean",
        ),
        (changed(purifier={"name": "inpainting", "width": 5}), "purifier inpainting: width is a multiple of 4, got 5"),
        (changed(purifier={"name": "inpainting", "width": "4"}), "purifier inpainting: width: Input should be a valid"),
        (changed(purifier={"name": "inpainting", "halvings": 3}), "the images' side is a multiple of 16, got 8"),
        (changed(purifier="nowhere:make"), "cannot get a purifier from nowhere:make: No module named 'nowhere'"),
        (changed(purifier="json:lods"), "cannot get a purifier from json:lods: module 'json' has no attribute 'lods'"),
        (changed(transform="rt5"), "no transform 'rt5'; did you mean 'rt"),
        (changed(transform={"sigma": 0.1}), "recipe tiny: the key 'purification.transform.name' is missing"),
        (changed(transform={"name": "rt2", "sgima": 1}), "no option of transform rt2 'sgima'; did you mean 'sigma'?"),
        (changed(transform={"name": "rt2", "sigma": "loud"}), "purification.transform: 'loud' is not a number such as"),
        (changed(transform={"name": "rt2", "sigma": True}), "transform rt2: sigma: Input should be a valid number"),
        (changed(transform={"name": "rt2", "cells": "8"}), "transform rt2: cells: Input should be a valid integer"),
        (changed(weight="little"), "purification.weight: 'little' is not a number such as 0.5 or 8/255"),
        (changed(transform={"name": "rt3", "missing": 0.3}), "transform rt3: missing must cut the 64 cells into equal"),
        (changed(transform={"name": "rt2", "cells": 3}), "cells must divide the 8 pixels of an image's side, got 3"),
        ({"data": {"name": "digits", "crop": 6}}, "cells must divide the 6 pixels of an image's side, got 8"),
        (changed(transform={"name": "rt1", "masks": "row"}), "masks: Input should be 'image', 'batch' or 'fixed', got"),
        (changed(weigth=1), "no key 'purification.weigth'; did you mean 'weight'?"),
        (changed(pretraining={"epochs": 2}), "the key 'purification.pretraining.optimizer' is missing"),
        (changed(pretraining={"epochs": 2, "optimizer": {"lr": 1, "momntum": 0}}), "did you mean 'momentum'?"),
        (changed(adversary="endtoend"), "purification.adversary: Input should be 'end_to_end', 'classifier' or 'none'"),
        (changed(weight=-1), "purification.weight: Input should be greater than or equal to 0, got -1"),
        (changed(votes=0), "purification.votes: Input should be greater than or equal to 1, got 0"),
        (changed(discriminator=0), "purification.discriminator: Input should be greater than or equal to 1, got 0"),
        (
            changed(trained_classifier="run"),
            "trained_classifier is given, so that nothing is left to train before: set classifier_training.epochs to 0",
        ),
        (
            changed(trained_purifier="run"),
            "trained_purifier is given, so that nothing is left to train before: set pretraining.epochs to 0",
        ),
        (
            changed(classifier_training={"epochs": 0, "optimizer": {"lr": 0.1}}),
            "the classifier would stay untrained: set classifier_training.epochs or trained_classifier",
        ),
        (
            changed(pretraining={"epochs": 0, "optimizer": ADAM}),
            "the purifier would come untrained into finetuning: set pretraining.epochs or trained_purifier",
        ),
        (
            changed(gan_gradient="detached", discriminator=None),
            "gan_gradient: detached is of a discriminator, and there is none: leave it out or set one",
        ),
        (changed(cross_entropy_from=50), "cross_entropy_from must come before the end of epochs"),
        (
            {"attack": {"mode": "train"}},
            "AToP attacks in evaluation mode, in which its classifier stays; set attack.mo",
        ),
        ({"threat": "stadv:0.05"}, "a recipe needs an Lp threat such as linf:8/255, got stadv:0.05"),
    ],
)
def test_a_mistake_is_said_in_one_line_before_anything_is_written(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = written(tmp_path, TINY | changes)
    with pytest.raises(UserError) as error:
        redan.train(path, tmp_path / "run", progress=False)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


# Whole runs.


def run(folder: Path, recipe: dict[str, Any] = TINY, **options: Any) -> Path:
    folder.parent.mkdir(exist_ok=True)
    return redan.train(written(folder.parent, recipe), folder, progress=False, **options)


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def kept(folder: Path, part: str) -> dict[str, Tensor]:
    """What the checkpoint holds of a part of the method."""
    tensors, _ = load_tensors(folder / "checkpoint" / "state.safetensors")
    return {k.removeprefix(f"method/{part}."): v for k, v in tensors.items() if k.startswith(f"method/{part}.")}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return bool(first) and first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("atop") / "whole")


def test_a_run_goes_through_its_phases(whole: Path) -> None:
    records = rows(whole)
    assert [record["phase"] for record in records] == ["classifier"] * 2 + ["purifier"] * 2 + ["finetuning"] * 3
    assert [record["robust_accuracy"] is not None for record in records] == [False] * 4 + [True] * 3
    for term, phases in (("distance", "purifier finetuning"), ("classification", "finetuning")):
        assert all((f"loss_{term}" in record) == (record["phase"] in phases) for record in records)
    assert records[1]["loss"] < records[0]["loss"] and records[3]["loss_distance"] < records[2]["loss_distance"]
    validated = [record["validation_robust_accuracy"] for record in records[4:]]
    _, metadata = load_tensors(whole / "model.safetensors")
    assert metadata["epoch"] == 5 + validated.index(max(validated))  # the best of finetuning, no earlier one


def test_a_run_gives_one_network_that_draws_from_torch(whole: Path) -> None:
    network = redan.load(whole, "last")
    assert isinstance(network, Purified) and not any(module.training for module in network.modules())
    x = to_float(load_dataset("digits").test.images[:20])
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        first, second = network(x), network(x)
        clean = network.purify(x)
        torch.manual_seed(1)
        assert torch.equal(network(x), first)
    assert first.shape == (20, 10) and not torch.equal(first, second)
    assert clean.shape == x.shape and clean.amin() >= 0 and clean.amax() <= 1 and clean.std() > 0
    assert equal(network.classifier.state_dict(), kept(whole, "network.classifier"))
    assert equal(network.purifier.state_dict(), kept(whole, "network.purifier"))
    assert {name.split(".")[0] for name in network.state_dict()} == {"purifier", "classifier"}


def stopped(folder: Path, monkeypatch: pytest.MonkeyPatch, steps: int, recipe: dict[str, Any] = TINY) -> Path:
    """A run that was stopped as by Ctrl-C after so many steps."""
    real, taken = trainer._Training._train_step, []

    def counted(self: Any, *args: Any) -> None:
        real(self, *args)
        taken.append(1)
        self.stop.requested = len(taken) == steps

    with monkeypatch.context() as context:
        context.setattr(trainer._Training, "_train_step", counted)
        with pytest.raises(redan.Stopped, match="--resume"):
            run(folder, recipe)
    return folder


PLACES = {
    "classifier": 5,
    "its last step": 8,
    "purifier": 10,
    "the purifier's last": 16,
    "finetuning": 19,
    "the end": 28,
}


@pytest.mark.parametrize("place", PLACES)
def test_a_resumed_run_comes_to_bitwise_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path, place: str
) -> None:
    parts = stopped(tmp_path / "parts", monkeypatch, PLACES[place])
    torch.manual_seed(PLACES[place])  # another process's randomness is elsewhere
    frozen, purifier = kept(parts, "network.classifier"), kept(parts, "network.purifier")
    run(parts, resume=True)
    for name in ("model.safetensors", "model-last.safetensors"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes()
    assert rows(whole) == rows(parts)
    # From the end of the first phase on the classifier is as it was; the purifier is begun after it.
    assert equal(frozen, kept(whole, "network.classifier")) == (PLACES[place] >= 2 * STEPS)
    fresh = build(load_recipe(whole), load_dataset("digits").facts).state_dict()
    untouched = {k.removeprefix("network.purifier."): v for k, v in fresh.items() if k.startswith("network.purifier.")}
    assert equal(purifier, untouched) == (PLACES[place] <= 2 * STEPS)


@pytest.mark.parametrize(
    "extra",
    [
        {"transform": "rt3", "purifier": {"name": "masked-autoencoder", **AUTOENCODER}, "discriminator": None},
        {"adversary": "classifier", "l_org_target": "clean", "gan_gradient": "detached", "cross_entropy_from": 1},
    ],
)
def test_other_kinds_run_and_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extra: dict[str, Any]) -> None:
    recipe = changed(**extra) | {"epochs": 2}
    parts = stopped(tmp_path / "parts", monkeypatch, 4 * STEPS + 3, recipe)
    run(parts, recipe, resume=True)
    first = run(tmp_path / "whole", recipe)
    assert rows(first) == rows(parts)
    assert (first / "model.safetensors").read_bytes() == (parts / "model.safetensors").read_bytes()
    counted = [record["robust_accuracy"] is not None for record in rows(first)[4:]]
    assert counted == [not extra.get("cross_entropy_from"), True]


def test_validation_has_the_same_draws_in_every_epoch_and_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = {"name": "sgd", "lr": 1e-30, "weight_decay": 0.0}  # a purifier that does not move
    stage = {"epochs": 2, "optimizer": {"lr": 0.1}}
    recipe = changed(classifier_training=stage, pretraining=stage | {"optimizer": slow}) | {"optimizer": slow}
    recipe |= {"epochs": 1}
    validated = [
        (record["validation_clean_accuracy"], record["validation_robust_accuracy"])
        for record in rows(run(tmp_path / "whole", recipe))
    ]
    assert validated[0] != validated[2] == validated[3] == validated[4]
    parts = stopped(tmp_path / "parts", monkeypatch, 4 * STEPS, recipe)
    torch.manual_seed(1)
    assert rows(run(parts, recipe, resume=True)) == rows(tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_train_one_run(tmp_path: Path, whole: Path) -> None:
    path = written(tmp_path, TINY)
    command = [sys.executable, "-m", "redan", "train", str(path), "--devices", "2", "--out", str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Trained:") == 1
    for mine, theirs in zip(rows(tmp_path / "two"), rows(whole), strict=True):
        assert mine["phase"] == theirs["phase"]
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=0.25)
        assert mine["validation_clean_accuracy"] == pytest.approx(theirs["validation_clean_accuracy"], abs=0.25)


# Parts from other runs.

GIVEN: dict[str, Any] = {"classifier_training": {"epochs": 0, "optimizer": {"lr": 0.1}}}
SHORT = {"epochs": 1, "gradient_clip": None}


def test_a_classifier_comes_from_any_run(tmp_path: Path, whole: Path) -> None:
    plain = {key: value for key, value in TINY.items() if key != "purification"} | {
        "epochs": 2,
        "optimizer": {"lr": 0.1},
    }
    sources = [
        run(tmp_path / "plain" / "run", plain | {"method": "standard"}),
        run(tmp_path / "arat" / "run", plain | {"method": "arat", "epochs": 1}),
        whole,
    ]
    for i, source in enumerate(sources):
        trained = redan.load(source)
        expected = (trained.classifier if isinstance(trained, Purified) else trained).state_dict()
        recipe = changed(trained_classifier=str(source), **GIVEN) | SHORT
        folder = run(tmp_path / f"{i}" / "run", recipe)
        assert [record["phase"] for record in rows(folder)] == ["purifier"] * 2 + ["finetuning"]
        network = redan.load(folder)
        assert isinstance(network, Purified)
        assert equal(network.classifier.state_dict(), expected)


def test_a_purifier_goes_on_with_its_critic(tmp_path: Path, whole: Path) -> None:
    none = {"epochs": 0, "optimizer": ADAM}
    given = {"trained_purifier": str(whole), "pretraining": none, "trained_classifier": str(whole), **GIVEN}
    still = SHORT | {"optimizer": {"name": "sgd", "lr": 1e-30, "weight_decay": 0.0}}
    folder = run(tmp_path / "run", changed(**given) | still)
    assert [record["phase"] for record in rows(folder)] == ["finetuning"]
    for part in ("network.purifier", "network.classifier"):
        assert equal(kept(folder, part), kept(whole, part))
    moving = ("_u", "_v")  # of the spectral norm, which moves without the optimiser
    mine, theirs = (
        {k: v for k, v in kept(source, "discriminator").items() if not k.endswith(moving)} for source in (folder, whole)
    )
    assert equal(mine, theirs)
    alone = run(tmp_path / "alone", changed(**given | {"discriminator": None}) | still)
    assert equal(kept(alone, "network.purifier"), kept(whole, "network.purifier"))


def test_a_resumed_run_needs_its_sources_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(whole, source)
    given = {"trained_classifier": str(source), "trained_purifier": str(source), **GIVEN}
    recipe = changed(**given | {"pretraining": {"epochs": 0, "optimizer": ADAM}}) | SHORT
    first = run(tmp_path / "first", recipe)
    parts = stopped(tmp_path / "parts", monkeypatch, 2, recipe)
    shutil.rmtree(source)
    run(parts, recipe, resume=True)
    assert (first / "model-last.safetensors").read_bytes() == (parts / "model-last.safetensors").read_bytes()
    assert redan.load(first)(torch.rand(2, 1, 8, 8)).shape == (2, 10)


def refused(folder: Path, recipe: dict[str, Any]) -> str:
    with pytest.raises(UserError) as error:
        run(folder / "run", recipe)
    assert "\n" not in str(error.value) and not (folder / "run").exists()
    return str(error.value)


def test_parts_that_do_not_fit_are_said(tmp_path: Path, whole: Path) -> None:
    plain = {"method": "standard", "purification": None, "model": "small-cnn", "epochs": 1, "optimizer": {"lr": 0.1}}
    trained = run(tmp_path / "trained" / "run", TINY | plain)
    classifier = {"trained_classifier": str(whole), **GIVEN}
    message = refused(tmp_path, changed(**classifier) | {"model": {"name": "small-cnn-bn", "width": 8}})
    assert (
        message
        == f"{whole} trained model small-cnn-bn with width 4, and this recipe describes small-cnn-bn with width 8"
    )
    message = refused(tmp_path, changed(trained_classifier=str(trained), **GIVEN))
    assert (
        message
        == f"{trained} trained model small-cnn with width 16, and this recipe describes small-cnn-bn with width 4"
    )
    message = refused(tmp_path, changed(trained_classifier=str(tmp_path / "nothing"), **GIVEN))
    assert message == f"there is no run folder {tmp_path / 'nothing'}"
    given = {"pretraining": {"epochs": 0, "optimizer": ADAM}}
    message = refused(tmp_path, changed(trained_purifier=str(trained), **given))
    assert message == f"purification.trained_purifier: {trained} trained no purifier"
    early = tmp_path / "early"
    shutil.copytree(whole, early)
    state, place = load_tensors(early / STATE)
    save_tensors(early / STATE, state, place | {"epoch": 0})
    message = refused(tmp_path, changed(trained_purifier=str(early), **given))
    assert message == (
        f"purification.trained_purifier: {early} has not finished training its purifier: go on with "
        f"redan train {early} --out {early} --resume"
    )
    wider = {"name": "inpainting", **INPAINTING, "width": 8}
    message = refused(tmp_path, changed(trained_purifier=str(whole), purifier=wider, **given))
    options = "width {}, halvings 1, dilations 1, attention False"
    assert message == (
        f"{whole} trained purifier inpainting with {options.format(4)}, and this recipe describes inpainting with "
        f"{options.format(8)}"
    )
    message = refused(tmp_path, changed(trained_purifier=str(whole), discriminator=8, **given))
    assert message.startswith(f"what {whole} trained is not what this recipe describes: ")


UNTRAINED = {"epochs": 0, "optimizer": ADAM}


def altered(folder: Path, whole: Path, done: int, **purification: Any) -> Path:
    """The run as it would be after so many epochs, with another recipe."""
    shutil.copytree(whole, folder)
    recipe = yaml.safe_load((whole / "recipe.yaml").read_text())
    recipe["purification"] |= purification
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    state, place = load_tensors(folder / STATE)
    if purification.get("discriminator", 4) is None:
        state = {name: tensor for name, tensor in state.items() if not name.startswith("method/discriminator.")}
    save_tensors(folder / STATE, state, place | {"epoch": done})
    return folder


def taken(source: Path) -> None:
    """A run begins with the purifier of that one."""
    recipe = Recipe.model_validate(changed(trained_purifier=str(source), pretraining=UNTRAINED))
    take_over(build(recipe, DIGITS), recipe, load_dataset("digits"))


@pytest.mark.parametrize(
    ("purification", "done", "finished"),
    [
        ({}, 2, False),
        ({}, 3, False),
        ({}, 4, True),
        (GIVEN | {"trained_classifier": "elsewhere"}, 1, False),
        (GIVEN | {"trained_classifier": "elsewhere"}, 2, True),
        ({"pretraining": UNTRAINED, "trained_purifier": "elsewhere"}, 0, True),
    ],
)
def test_a_purifier_is_taken_once_it_is_trained(
    tmp_path: Path, whole: Path, purification: dict[str, Any], done: int, finished: bool
) -> None:
    source = altered(tmp_path / "source", whole, done, **purification)
    if finished:
        taken(source)
        return
    with pytest.raises(UserError, match=f"{source} has not finished training its purifier: go on with .* --resume$"):
        taken(source)


def test_training_does_not_go_on_with_a_critic_that_is_not_there(tmp_path: Path, whole: Path) -> None:
    source = altered(tmp_path / "source", whole, 7, discriminator=None)
    message = f"purification.trained_purifier: {source} trained no discriminator to go on with; set purification.disc"
    with pytest.raises(UserError, match=message) as error:
        taken(source)
    assert "\n" not in str(error.value)


def test_a_network_with_like_weights_is_another_one_all_the_same(tmp_path: Path) -> None:
    # Strides and heads leave no trace in the weights.
    begun = {"data": {"name": "digits", "train_samples": 100, "validation_samples": 0}, "epochs": 1}
    resnet = {"name": "resnet18", "width": 2, "second_stride": 1}
    purifier = {"name": "masked-autoencoder", **AUTOENCODER}
    recipe = changed(purifier=purifier, classifier_training={"epochs": 1, "optimizer": {"lr": 0.1}}) | begun
    source = run(tmp_path / "source" / "run", recipe | {"model": resnet})
    given = changed(trained_classifier=str(source), **GIVEN) | {"model": resnet | {"second_stride": 2}}
    assert "second_stride 1, and this recipe describes resnet18 with width 2, second_stride 2" in refused(
        tmp_path, given
    )
    other = purifier | {"heads": 4}
    given = changed(trained_purifier=str(source), purifier=other, pretraining={"epochs": 0, "optimizer": ADAM})
    assert "trained purifier masked-autoencoder with" in refused(tmp_path, given)


def test_a_classifier_of_other_images_is_said(tmp_path: Path, whole: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(whole, other)
    for name in ("model.safetensors", "model-last.safetensors"):
        tensors, metadata = load_tensors(other / name)
        save_tensors(other / name, tensors, metadata | {"facts": metadata["facts"] | {"mean": [0.1]}})
    message = refused(tmp_path, changed(trained_classifier=str(other), **GIVEN))
    assert message == f"{other} is a run on digits, whose classes or normalisation are not those of digits"


# A user's own.

OWN = """
from torch import nn


class Own(nn.Module):
    def __init__(self, channels, width):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, channels, 1))

    def forward(self, images, holes):
        if holes.shape[1] != 1:
            raise ValueError("holes")
        return images + holes * self.body(images)


def make(channels, size, width=3):
    assert size == 8
    return Own(channels, width)
"""


def test_a_purifier_may_be_a_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path) -> None:
    (tmp_path / "atop_tests_own.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    mine = {"name": "atop_tests_own:make", "width": 5}
    recipe = changed(purifier=mine, trained_classifier=str(whole), **GIVEN) | SHORT
    assert (
        Recipe.model_validate(load_recipe(written(tmp_path, recipe)).resolved()).resolved()["purification"]["purifier"]
        == mine
    )
    folder = run(tmp_path / "runs" / "own", recipe)
    network = redan.load(folder)
    assert isinstance(network, Purified) and isinstance(network.purifier, Plain)
    assert type(network.purifier.network).__name__ == "Own" and network.purifier.network.body[0].out_channels == 5  # type: ignore[index, union-attr]
    assert network(torch.rand(2, 1, 8, 8)).shape == (2, 10)
    assert not equal(
        kept(folder, "network.purifier"), {k: torch.zeros_like(v) for k, v in kept(folder, "network.purifier").items()}
    )
    message = refused(tmp_path / "runs", recipe | changed(purifier=mine | {"depth": 2}))
    assert message.startswith("cannot get a purifier from atop_tests_own:make: make() got an unexpected keyword")


# What is built on runs.


def test_analyse_looks_inside_a_run_of_it(tmp_path: Path, whole: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    found = redan.analyse(tmp_path / "run", samples=20, batches=1, progress=False)
    assert found.method == "atop" and found.conflicts == {} and set(found.branches) == {"shared"}
    assert (tmp_path / "run" / "analysis.json").exists()
    torch.manual_seed(5)  # whatever torch's own generator is at, and however many draws vote
    recipe = yaml.safe_load((whole / "recipe.yaml").read_text())
    recipe["purification"]["votes"] = 3
    (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    again = redan.analyse(tmp_path / "run", samples=20, batches=1, progress=False)
    assert again.branches == found.branches
