"""COLT's certificate (Balunović & Vechev, ICLR 2020): zonotopes with learned slopes, linear programs, few binaries.

What a zonotope with learned slopes leaves open goes on, image by image: the neurons of an early layer whose ReLU may be
on or off are bounded by linear programs; then the slopes are learned anew for one wrong class at a time, the size of
the gradient by a ReLU's slope tells how urgent it is, and mixed-integer programs look for the least margin with the
most urgent ReLUs of the last layers exact, more of them from try to try.

What differs from the public code. The layers before the exact ones are triangles here, zonotopes there: triangles are
tighter. The programs go from the pixels' box, its later ones from error terms. A linear program is solved for one side
of a neuron alone where that settles its sign. An image has so many seconds, not each wrong class of each try; learning
ends after steps in which nothing is gained; bounds of single neurons are not learned for (``refine_opt``, of the last
try at 8/255). Bounds cover rounding. The solver is an open one.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

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

# Of each try: in how many ReLU layers at the end some are exact, and how many of each. Those published for 2/255; those
# for 8/255 are 30, 60 and all of the last layer, then 120 of the last two.
TRIES = ((1, 30), (1, 100), (2, 60))


@dataclass(frozen=True)
class LateMilp:
    """The part of COLT's certificate that goes image by image; the published numbers are the defaults.

    Args:
        tries: for each wrong class one after the other until it is shown, see ``TRIES``.
        sound: which rounding errors the bounds cover.
        solver: of the programs, see ``solvers.solve``.
        threads: of the solver.
    """

    tries: tuple[tuple[int, int], ...] = TRIES
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
        for last_layers, binaries in self._tries(network, tighter):
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
                binaries=Binaries(last_layers=last_layers, per_layer=binaries, priorities=learned.urgency),
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

    def _tries(self, network: Network, layers: dict[int, tuple[Tensor, Tensor]]) -> Iterator[tuple[int, int]]:
        """Those that are not the program of the one before: fewer ReLUs may be open than are to be exact."""
        taken = [layers[network.layers[relu].inputs[0]] for relu in reversed(network.relus)]
        counts = [int(((low < 0) & (high > 0)).sum()) for low, high in taken]  # from the last layer back
        before: list[int] | None = None
        for last_layers, binaries in self.tries:
            exact = [min(binaries, count) * (k < last_layers) for k, count in enumerate(counts)]
            if exact != before:
                yield last_layers, binaries
            before = exact


def _halfway(deadline: float) -> float:
    """From now to it."""
    now = time.monotonic()
    return now + (deadline - now) / 2
