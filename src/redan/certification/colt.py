"""COLT's certificate (Balunović & Vechev, ICLR 2020): zonotopes with learned slopes, linear programs, few binaries.

What a zonotope with learned slopes leaves open goes on, image by image: the neurons of an early layer whose ReLU may be
on or off are bounded by linear programs; then the slopes are learned anew for one wrong class at a time, the size of
the gradient by a ReLU's slope tells how urgent it is, and mixed-integer programs look for the least margin with the
most urgent ReLUs of the last layers exact, more of them from try to try.

What differs from the public code. The layers before the exact ones are triangles here, zonotopes there: triangles are
tighter. The programs go from the pixels' box, its later ones from error terms. A linear program is solved for one side
of a neuron alone where that settles its sign. An image has so many seconds, not each wrong class of each try; learning
ends after steps in which nothing is gained; for the last try at 8/255 bounds of single neurons are not learned
(``refine_opt``), and no image is too far off. Bounds cover rounding. The solver is an open one.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from redan.certification.milp import Binaries, lp_refine, minimise
from redan.certification.network import Network
from redan.certification.regions import Bounds, Region, Specification
from redan.certification.rounding import SoundFloat
from redan.certification.solvers import Solver
from redan.certification.zonotope import learn

REFINED = 1  # of the layers that ReLUs take, counted from 0, the one that linear programs bound: the second
LP_SECONDS = 10.0  # for one neuron
ITERATIONS = 500  # of Adam on the slopes, at most

# By method of certification, which ReLUs are exact in each try: those published for 2/255, and those for 8/255.
TRIES = {
    "colt": (Binaries(1, per_layer=30), Binaries(1, per_layer=100), Binaries(2, per_layer=60)),
    "colt-8": (Binaries(1, per_layer=30), Binaries(1, per_layer=60), Binaries(1), Binaries(2, in_all=120)),
}


@dataclass(frozen=True)
class LateMilp:
    """The part of COLT's certificate that goes image by image; the published numbers are the defaults.

    Args:
        tries: for each wrong class one after the other until it is shown; their priorities are learned.
        sound: which rounding errors the bounds cover.
        solver: of the programs, see ``solvers.solve``.
        threads: of the solver.
    """

    tries: tuple[Binaries, ...] = TRIES["colt"]
    sound: SoundFloat = "exact"
    solver: Solver = "auto"
    threads: int = 1

    def __call__(
        self,
        network: Network,
        region: Region,
        specification: Specification,
        bounds: Bounds,
        *,
        deadline: float,
        tried: Callable[[Tensor], bool],
    ) -> bool:
        """Whether every group of functions holds on an image's box.

        Args:
            network: the network, on the CPU in float64.
            region: one image's region, a box.
            specification: what is to be shown of it.
            bounds: what is known.
            deadline: by ``time.monotonic``. Of what is left, linear programs take at most half, and so does learning
                for each class, so that no step starves those behind it.
            tried: is asked of an image ``(*input_shape)`` with a small margin whether it is a counterexample, which
                ends the search.
        """
        layers = {i: (low.cpu().double(), high.cpu().double()) for i, (low, high) in bounds.layers.items()}
        if len(network.bent) > REFINED:
            position = network.bent[REFINED]
            low, high = lp_refine(
                network,
                region,
                layers,
                position,
                image=0,
                sound=self.sound,
                solver=self.solver,
                timeout=LP_SECONDS,
                deadline=_halfway(deadline),
            )
            layers[position] = (low[None], high[None])
        return all(
            any(self._row(network, region, specification, layers, int(row), deadline, tried) for row in rows)
            for rows in specification.left(bounds.margins[0].cpu())
        )

    def _row(
        self,
        network: Network,
        region: Region,
        specification: Specification,
        layers: dict[int, tuple[Tensor, Tensor]],
        row: int,
        deadline: float,
        tried: Callable[[Tensor], bool],
    ) -> bool:
        if time.monotonic() >= deadline:
            return False
        learned = learn(
            network,
            region,
            specification.row(row),
            iterations=ITERATIONS,
            sound=self.sound,
            given=layers,
            deadline=_halfway(deadline),
        )
        if learned.bounds.margins[0, 0] > 0:
            return True
        tighter = {
            i: (torch.maximum(low, learned.bounds.layers[i][0]), torch.minimum(high, learned.bounds.layers[i][1]))
            for i, (low, high) in layers.items()
        }
        for binaries in self._tries(network, tighter):
            seconds = deadline - time.monotonic()
            if seconds <= 0:
                return False
            found = minimise(
                network,
                region,
                specification,
                tighter,
                image=0,
                rows=[row],
                binaries=replace(binaries, priorities=learned.urgency),
                sound=self.sound,
                solver=self.solver,
                timeout=seconds,
                threads=self.threads,
            )
            if found.lower[0] > 0:
                return True
            candidate = found.candidates[0]
            if candidate is not None and tried(candidate):
                return False
        return False

    def _tries(self, network: Network, layers: dict[int, tuple[Tensor, Tensor]]) -> Iterator[Binaries]:
        """Those that are not the program of the one before: fewer ReLUs may be open than are to be exact."""
        taken = [layers[network.layers[relu].inputs[0]] for relu in reversed(network.relus)]
        counts = [int(((low < 0) & (high > 0)).sum()) for low, high in taken]  # from the last layer back
        before: tuple[list[int], int] | None = None
        for binaries in self.tries:
            late = [count for count in counts[: binaries.last_layers] if count]
            exact = late if binaries.per_layer is None else [min(binaries.per_layer, count) for count in late]
            in_all = sum(exact) if binaries.in_all is None else min(binaries.in_all, sum(exact))
            if (exact, in_all) != before:
                yield binaries
            before = exact, in_all


def _halfway(deadline: float) -> float:
    """From now to it."""
    now = time.monotonic()
    return now + (deadline - now) / 2
