"""AR-AT (Waseda, Chang & Echizen, ICLR 2025): invariance to attacks, regularised from one side only.

Where a loss pulls the features of clean and adversarial images together, the pull on the clean side drags good features
towards corrupted ones, against classification. AR-AT stops the gradient there, gives the adversarial side a predictor,
and gives clean and adversarial images BatchNorms of their own.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from redan.attacks.pgd import PGD
from redan.data.types import Batch
from redan.errors import UserError
from redan.methods.base import NetworkMethod, StepOutput
from redan.methods.targets import soft_cross_entropy
from redan.models.split_norm import Branch, merge_batch_norm, split_batch_norm, using_branch
from redan.models.taps import FeatureTaps, without_taps
from redan.seeds import generator
from redan.threats import Linf

BALANCE_IMAGES = 1024  # of the training set, by which the weights of the two cross-entropies are set after each epoch

CleanBatch = Literal["textbook", "noised"]


class Passes(NamedTuple):
    """Logits ``(n, classes)`` and features ``(n, channels)`` by layer, of the clean and the adversarial images."""

    clean: Tensor
    z: dict[str, Tensor]
    attacked: Tensor
    z_adversarial: dict[str, Tensor]


class ARAT(NetworkMethod):
    """min E[ alpha CE(f_main(x'), y) + beta CE(f_aux(x), y) + gamma Dist(h(z'_main), sg(z_aux)) ].

    f_main and f_aux share all weights but BatchNorm's; z are the ReLU'd, spatially averaged outputs of ``layers``; h is
    a predictor, one a layer; sg stops the gradient; Dist is 1 - cosine, the mean over images and layers.

    Args:
        gamma: weight of invariance; 30 for ResNet-18, 100 for WRN-34-10 as published. 0 leaves classification alone.
        stop_gradient: sg on the side that is the target; without it both sides move.
        predictor: h; without it the identity.
        split_bn: separate BatchNorms; without them f_main is f_aux.
        auto_balance: alpha is the clean accuracy of f_aux on training images after the last epoch, beta = 1 - alpha;
            without it both are 1.
        symmetric: the mean of Dist(h(z'), sg(z)) and Dist(h(z), sg(z')) in place of the first.
        layers: names of the regularised layers, by their outputs; None is the network's own ``activations``: all ReLU
            outputs of the last stage.
        clean_batch: ``textbook``, or ``noised``: images with uniform noise of the threat's size, not clipped, take the
            clean images' place in the loss and as centre and start of the attack. The public code does this, as its
            attack writes its random start into the batch; examples then lie up to twice the radius away.
        deploy_branch: whose BatchNorm is shipped; ``clean`` is for analysis.

    Raises:
        UserError: where one is out of range, the network says nothing of its activations and no layers are named, or
            noise is asked for without PGD in an Linf ball.
    """

    balance: Tensor

    def __init__(
        self,
        network: nn.Module,
        *args: Any,
        gamma: float = 30.0,
        stop_gradient: bool = True,
        predictor: bool = True,
        split_bn: bool = True,
        auto_balance: bool = True,
        symmetric: bool = False,
        layers: tuple[str, ...] | None = None,
        clean_batch: CleanBatch = "textbook",
        deploy_branch: Branch = "adversarial",
        **kwargs: Any,
    ) -> None:
        if split_bn:
            if not any(isinstance(module, nn.BatchNorm2d) for module in network.modules()):
                raise UserError("AR-AT: this network has no BatchNorm2d to split; set method.split_bn to false")
            network = split_batch_norm(network)
        super().__init__(network, *args, **kwargs)
        if not 0 <= gamma < float("inf"):
            raise UserError(f"AR-AT takes a gamma of at least 0, got {gamma}")
        if layers is None:
            layers = getattr(network, "activations", ())
        if not layers:
            raise UserError("AR-AT: this network does not say which layers to regularise; name them in method.layers")
        if deploy_branch == "clean" and not split_bn:
            raise UserError("AR-AT: deploy_branch clean needs split_bn; without it there is one branch")
        self.gamma, self.stop_gradient, self.symmetric = gamma, stop_gradient, symmetric
        self.split_bn, self.auto_balance, self.deploy_branch = split_bn, auto_balance, deploy_branch
        self.noise = 0.0
        if clean_batch == "noised":
            if self.adversary is None or not isinstance(self.adversary.attack, PGD):
                raise UserError("AR-AT: clean_batch noised needs training against PGD; without it, take textbook")
            self.noise = Linf.require(self.adversary.attack.threat, "AR-AT: clean_batch noised").radius
        self.taps = FeatureTaps(network, layers)
        widths = [_width(network.get_submodule(layer), layer) for layer in layers]
        self.predictors = nn.ModuleList(Predictor(width) if predictor else nn.Identity() for width in widths)
        self.register_buffer("balance", torch.tensor(-1.0))  # not known before the first epoch has ended

    def perturb(self, batch: Batch) -> Tensor:
        """See ``Method.perturb``: against f_main."""
        if not self.noise:
            return super().perturb(batch)
        assert self.adversary is not None and isinstance(self.adversary.attack, PGD)
        self.search.refresh()
        attack = dataclasses.replace(self.adversary.attack, start="image")
        return attack.run(self.search, self.clean_images(batch), batch.labels, self.draws).images

    def clean_images(self, batch: Batch) -> Tensor:
        """What takes the clean images' place: they themselves, or noised ones, the same at each call in a step."""
        if not self.noise:
            return batch.images
        seed = torch.initial_seed() if self.draws is None else self.draws.initial_seed()
        draw = torch.rand(batch.images.shape, generator=generator(seed, "noise")).to(batch.images.device)
        return batch.images + self.noise * (2 * draw - 1)

    def passes(self, batch: Batch, adversarial: Tensor) -> Passes:
        """The clean images through f_aux and the adversarial ones through f_main, in that order."""
        with using_branch(self.network, "clean"), self.taps.listening() as z:
            clean = self.network(self.clean_images(batch))
        for layer in self.taps.layers:
            if layer not in z:
                raise UserError(f"AR-AT: the layer {layer} takes no part in the network's forward pass")
        with self.taps.listening() as z_adversarial:
            attacked = self.network(adversarial)
        return Passes(clean, z, attacked, z_adversarial)

    def loss(self, batch: Batch, adversarial: Tensor) -> StepOutput:
        """See ``Method.loss``; ``invariance`` is the mean cosine of clean and adversarial features, before h."""
        clean, z, attacked, z_adversarial = self.passes(batch, adversarial)
        targets = self.targets(batch.labels, batch.indices, clean.shape[1])
        ce_adversarial = soft_cross_entropy(attacked, targets).mean()
        ce_clean = soft_cross_entropy(clean, targets).mean()
        alpha, beta = self._weights(clean.shape[1])
        distance = self.distance(z_adversarial, z)
        terms = {"classification": alpha * ce_adversarial + beta * ce_clean, "invariance": self.gamma * distance}
        return StepOutput(
            terms["classification"] + terms["invariance"],
            adversarial_logits=attacked,
            scalars={
                "loss_adversarial": ce_adversarial.detach(),
                "loss_clean": ce_clean.detach(),
                "distance": distance.detach(),
                "invariance": 1 - cosine_distance(z_adversarial, z).detach(),
                "alpha": alpha,
                "clean_branch_accuracy": (clean.argmax(1) == batch.labels).float().mean(),
            },
            terms=terms,
        )

    def distance(self, z_adversarial: dict[str, Tensor], z: dict[str, Tensor]) -> Tensor:
        """The mean over layers and images of 1 - cosine, with predictor and stopped gradient as this method has them.

        Args:
            z_adversarial: features of the adversarial images, ``(n, channels)`` by layer.
            z: of the clean ones, likewise.
        """

        def one_way(moving: dict[str, Tensor], still: dict[str, Tensor]) -> Tensor:
            pairs = zip(self.taps.layers, self.predictors, strict=True)
            predicted = {layer: h(moving[layer]).float() for layer, h in pairs}
            stopped = {layer: features.detach() for layer, features in still.items()}
            return cosine_distance(predicted, stopped if self.stop_gradient else still)

        if self.symmetric:
            return (one_way(z_adversarial, z) + one_way(z, z_adversarial)) / 2
        return one_way(z_adversarial, z)

    def _weights(self, classes: int) -> tuple[Tensor, Tensor]:
        """The weights alpha and beta; in the first epoch the clean accuracy counts as that of guessing."""
        if not self.auto_balance:
            return torch.ones_like(self.balance), torch.ones_like(self.balance)
        alpha = torch.where(self.balance >= 0, self.balance, 1 / classes)
        return alpha, 1 - alpha

    @torch.no_grad()
    def after_epoch(self, batches: Callable[[], Iterable[Batch]]) -> None:
        """Measure the clean accuracy of f_aux on training images, for the weights of the next epoch."""
        super().after_epoch(batches)
        if not self.auto_balance:
            return
        auxiliary = self.branch("clean" if self.split_bn else "adversarial").eval()
        right, seen = 0, 0
        for batch in batches():
            right += int((auxiliary(batch.images).argmax(1) == batch.labels).sum())
            seen += len(batch.labels)
            if seen >= BALANCE_IMAGES:
                break
        self.balance.fill_(right / seen)

    def branch(self, branch: Branch) -> nn.Module:
        """The plain network of one branch, a copy: ``adversarial`` is f_main, ``clean`` is f_aux."""
        return without_taps(merge_batch_norm(self.network, branch))

    def deployed(self) -> nn.Module:
        """f_main, which takes clean and adversarial images alike; a copy without pairs, predictors and taps."""
        return self.branch(self.deploy_branch)


def cosine_distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> Tensor:
    """Dist: 1 - cosine, the mean over images and layers, of features ``(n, channels)`` by layer."""
    return torch.stack([1 - F.cosine_similarity(one[layer], other[layer], dim=1).mean() for layer in one]).mean()


class Predictor(nn.Sequential):
    """h: a bottleneck of a quarter of the width, with BatchNorm. Shape: ``(n, width)`` to the same."""

    def __init__(self, width: int) -> None:
        hidden = max(width // 4, 1)
        super().__init__(
            nn.Linear(width, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, width)
        )


def _width(module: nn.Module, layer: str) -> int:
    """Channels of a layer's output: those of the last layer in it that has a number of its own."""
    for part in reversed(list(module.modules())):
        for attribute in ("num_features", "out_channels", "out_features"):
            if hasattr(part, attribute):
                return int(getattr(part, attribute))
    raise UserError(f"AR-AT: the layer {layer} has no channels of its own; name a BatchNorm or a convolution")
