"""COLT (Balunović & Vechev, ICLR 2020): convex layerwise adversarial training.

A verifier fails where what it encloses behind some layer holds points that are misclassified, be they reachable or not.
So training looks for such points, layer by layer: in a zonotope around what reaches it, the layers before being frozen.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from redan.attacks.pgd import PGD
from redan.attacks.search import has_fast_bfloat16
from redan.certification.cauchy import estimate_bounds
from redan.certification.chain import check_chain, read_chain
from redan.certification.interval import Box
from redan.certification.latent import Latent
from redan.certification.network import Network
from redan.certification.regions import Region
from redan.data.types import Batch
from redan.errors import UserError, unknown
from redan.methods.base import NetworkMethod, Phase, StepOutput
from redan.methods.targets import soft_cross_entropy
from redan.threats import Linf

INPUT = "input"  # what the first phase attacks, and the first layer of a graph


@dataclass(frozen=True)
class Stage:
    """What one phase does. Layers are positions in the network's graph: 0 is the image, i + 1 the i-th module.

    Attributes:
        attacked: whose output is attacked; it and all before it are frozen, unless it is the image.
        before: that the phase before attacked; None where its loss was that of clean images.
        after: the ReLU that the next phase attacks; None in the last phase.
        radius: of the boxes around images.
        rate: factor of the learning rate.
        stability: rho, the weight of the ReLU stability loss.
    """

    attacked: int
    before: int | None
    after: int | None
    radius: float
    rate: float
    stability: float


class COLT(NetworkMethod):
    """min E[ kappa CE(h(z), y) + (1 - kappa) CE(h'(z'), y) ] + l1 |w|_1 + kappa rho S, in phases j = 0, ..., m - 1.

    z maximises the cross-entropy over the zonotope C(x) at the output of the phase's layer, h being the layers behind
    it, which alone are trained; phase 0 attacks the image. h' and z' are those of the phase before; in phase 0, z' is
    the image as it is. kappa rises from 0 to 1 over the first ``mixing`` epochs of a phase. S = sum_i max(-l_i, 0)
    max(u_i, 0), averaged over the images, l and u bounding what the ReLU takes that the next phase attacks. In phase j
    the radius is the threat's times ``start_factor radius_factor^(m - 1 - j)``, the learning rate the optimiser's times
    ``rate_factor^j``, and rho is ``stability stability_factor^j``. Each phase has the recipe's epochs and schedule.

    Bounds are exact behind the first layer with weights, and estimates behind each later one. The attack starts at
    random coefficients of the zonotope and moves each, in [-1, 1], by the sign of its gradient: as far as the
    adversary's ``step_size`` is a share of the threat's radius. The last weights are the ones to ship, for while what
    can be proved rises, accuracy under attack, which validation sees, falls.

    Args:
        layers: attacked, one a phase: ``input``, then ReLUs by name; all but the last ReLU if empty.
        start_factor: see above; like the other factors above 0 and up to 100.
        radius_factor: likewise.
        rate_factor: likewise.
        mixing: likewise; at least 0 and no longer than a phase.
        l1: weight of the L1 norm of the trained weights, without biases.
        stability: see above.
        stability_factor: likewise.
        projections: Cauchy projections of each group of error terms, at least 1.
        trained_network: a run whose network is the start. It takes the place of phase 0.
    """

    def __init__(
        self,
        *args: Any,
        layers: tuple[str, ...] = (),
        start_factor: float = 1.05,
        radius_factor: float = 1.1,
        rate_factor: float = 0.75,
        mixing: float = 60.0,
        l1: float = 1e-5,
        stability: float = 0.005,
        stability_factor: float = 1.5,
        projections: int = 50,
        trained_network: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        factors = {"start_factor": start_factor, "radius_factor": radius_factor}
        factors |= {"rate_factor": rate_factor, "stability_factor": stability_factor}
        for name, number in factors.items():
            if not 0 < number <= 100:
                raise UserError(f"COLT takes a {name} above 0 and up to 100, got {number}")
        for name, number in {"mixing": mixing, "l1": l1, "stability": stability}.items():
            if not 0 <= number < float("inf"):
                raise UserError(f"COLT takes {name} of at least 0, got {number}")
        if projections < 1:
            raise UserError(f"COLT takes at least 1 of projections, got {projections}")
        if self.adversary is None or not isinstance(self.adversary.attack, PGD):
            raise UserError("COLT searches zonotopes as PGD searches a ball; its adversary is a PGD")
        if self.adversary.mode != "eval" or self.adversary.bn_momentum_in_attack:
            raise UserError("COLT's networks have no BatchNorm; leave attack.mode and attack.bn_momentum_in_attack out")
        self.attack = self.adversary.attack
        if self.attack.start != "random":
            raise UserError(f"COLT starts at random in a zonotope, not {self.attack.start!r}; leave attack.start out")
        threat = Linf.require(self.attack.threat, "COLT")
        if not threat.radius:
            raise UserError("COLT takes a threat whose radius is above 0")
        chain = check_chain(self.network)
        self._chain = (chain,)  # in a tuple, so that it is no second submodule
        places = {INPUT: 0} | {name: i + 1 for i, (name, it) in enumerate(chain.named_children()) if _bends(it)}
        self.layers = tuple(layers) or tuple(places)[:-1]
        for name in self.layers:
            if name not in places:
                raise unknown("layer that COLT may attack", name, places)
        attacked = [places[name] for name in self.layers]
        if attacked[0] or attacked != sorted(set(attacked)):
            raise UserError(f"COLT attacks layers from {INPUT!r} on, each once and in order, got {list(self.layers)}")
        m = len(attacked)
        self._stages = {
            f"layer {name}" if j else INPUT: Stage(
                attacked=attacked[j],
                before=attacked[j - 1] if j else None,
                after=attacked[j + 1] if j + 1 < m else None,
                radius=threat.radius * start_factor * radius_factor ** (m - 1 - j),
                rate=rate_factor**j,
                stability=stability * stability_factor**j,
            )
            for j, name in enumerate(self.layers)
            if j or trained_network is None
        }
        if not self._stages:
            raise UserError("a trained_network takes the place of the phase that attacks the image; name more layers")
        self.start_factor, self.radius_factor, self.rate_factor = start_factor, radius_factor, rate_factor
        self.stability, self.stability_factor, self.l1 = stability, stability_factor, l1
        self.mixing, self.projections = mixing, projections
        self.trained_network = trained_network
        self._share = self.attack.step_size / threat.radius if self.attack.step_size else 2.5 / self.attack.steps
        self._begins: dict[str, int] = {}
        self._phase = next(iter(self._stages))
        self._known: tuple[Network, Region, dict[int, Box]] | None = None

    @property
    def chain(self) -> nn.Sequential:
        """The network as its layers."""
        return self._chain[0]

    @property
    def stage(self) -> Stage:
        """What the present phase does."""
        return self._stages[self._phase]

    @property
    def kappa(self) -> float:
        """The weight of the present phase's loss, in [0, 1]."""
        done = self.epoch - self._begins.get(self._phase, 0)
        return 1.0 if done >= self.mixing else max(done / self.mixing, 0.0)

    def phases(self, planned: Phase) -> list[Phase]:
        """One a layer, each as planned but for its learning rate."""
        if self.mixing > planned.epochs:
            raise UserError(
                f"COLT's mixing of {self.mixing:g} epochs is longer than a phase, which has {planned.epochs}; set "
                "method.mixing, too"
            )
        self._begins = {name: i * planned.epochs for i, name in enumerate(self._stages)}
        optimizer = planned.optimizer
        return [
            Phase(name, planned.epochs, optimizer.model_copy(update={"lr": optimizer.lr * it.rate}), planned.schedule)
            for name, it in self._stages.items()
        ]

    def enter(self, phase: Phase) -> None:
        """Freeze all up to the layer that the phase attacks."""
        self._phase = phase.name
        for i, module in enumerate(self.chain.children()):
            module.requires_grad_(i >= self.stage.attacked)

    def perturb(self, batch: Batch) -> Tensor:
        """The points ``(n, ...)`` behind the attacked layer that the loss is to be small at."""
        self._known = self._look(batch)
        return self._attack(*self._known, self.stage.attacked, batch.labels)

    def loss(self, batch: Batch, adversarial: Tensor) -> StepOutput:
        """See ``Method.loss``; of the points that ``perturb`` gave."""
        known = self._look(batch) if self._known is None else self._known
        self._known = None  # the gradient of the bounds can be followed once
        stage, kappa = self.stage, self.kappa
        logits = self.chain[stage.attacked :](adversarial)
        targets = self.targets(batch.labels, batch.indices, logits.shape[1])
        loss = soft_cross_entropy(logits, targets).mean()
        scalars = {"kappa": torch.tensor(kappa)}
        if kappa < 1:
            points = batch.images
            if stage.before is not None:
                points = self._attack(*known, stage.before, batch.labels)
            earlier = soft_cross_entropy(self.chain[stage.before or 0 :](points), targets).mean()
            loss = kappa * loss + (1 - kappa) * earlier
        if stage.after is not None and stage.stability:
            lower, upper = known[2][stage.after - 1]
            unstable = (F.relu(-lower) * F.relu(upper)).flatten(1).sum(1).mean()
            scalars["stability"] = unstable.detach()
            loss = loss + kappa * stage.stability * unstable
        if self.l1:
            trained = self.chain[stage.attacked :].children()
            sizes = [it.weight.abs().sum() for it in trained if isinstance(it, nn.Conv2d | nn.Linear)]
            loss = loss + self.l1 * torch.stack(sizes).sum()
        return StepOutput(loss, adversarial_logits=logits, scalars=scalars)

    @property
    def selects_by(self) -> Literal["clean", "robust", "last"]:
        """See ``Method.selects_by``."""
        return "last"

    def _look(self, batch: Batch) -> tuple[Network, Region, dict[int, Box]]:
        """The graph of the network, boxes around the images, and bounds as far as the phase needs them."""
        stage = self.stage
        with torch.autocast(batch.images.device.type, enabled=False):
            graph = read_chain(self.chain, tuple(batch.images.shape[1:]))
            region = Region.around(batch.images, Linf(stage.radius))
            needed = stage.after if stage.after is not None and stage.stability else stage.attacked
            bounds = estimate_bounds(
                graph,
                region,
                projections=self.projections,
                generator=self.draws,
                until=needed - 1,
                dtype=self._precision(batch.images),
            )
        return graph, region, bounds

    def _attack(self, graph: Network, region: Region, bounds: dict[int, Box], layer: int, labels: Tensor) -> Tensor:
        """PGD on the coefficients of the zonotopes at a layer: the points ``(n, ...)`` it comes to."""
        with torch.autocast(labels.device.type, enabled=False), torch.no_grad():
            latent = Latent(graph, region, bounds, layer)
            coefficients = latent.start(self.draws)
            precision = self._precision(latent.centre)
            search, rest = latent.to(precision), graph.to(precision).layers[layer + 1 :]
            for _ in range(self.attack.steps):
                leaves = {i: it.to(precision).requires_grad_() for i, it in coefficients.items()}
                with torch.enable_grad():
                    x = search(leaves)
                    for module in rest:
                        x = module(x)
                    loss = F.cross_entropy(x.float(), labels, reduction="sum")
                gradients = torch.autograd.grad(loss, list(leaves.values()))
                for (i, it), gradient in zip(coefficients.items(), gradients, strict=True):
                    coefficients[i] = it.add(gradient.sign(), alpha=self._share).clamp_(-1, 1)
            return latent(coefficients)

    def _precision(self, example: Tensor) -> torch.dtype:
        assert self.adversary is not None
        asked = self.adversary.precision
        fast = asked == "bfloat16" or (asked == "auto" and has_fast_bfloat16(example.device))
        return torch.bfloat16 if fast else torch.float32


def _bends(module: nn.Module) -> bool:
    return isinstance(module, nn.ReLU)
