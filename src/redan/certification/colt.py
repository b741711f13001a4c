"""COLT's certificate (Balunović & Vechev, ICLR 2020): zonotopes with learned slopes, linear programs, few binaries.

What a zonotope with learned slopes leaves open goes on, image by image: the neurons of an early layer whose ReLU may be
on or off are bounded by linear programs; then the slopes are learned anew for one wrong class at a time, the size of
the gradient by a ReLU's slope tells how urgent it is, and a mixed-integer program looks for the least margin with the
most urgent ReLUs of the last layers exact.

What differs from the public code. The layers before the exact ones are triangles here, zonotopes there: triangles are
tighter. The programs go from the pixels' box, its later ones from error terms. Bounds cover rounding. The solver is an
open one.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from redan.certification.milp import Binaries, lp_refine, minimise
from redan.certification.network import Network
from redan.certification.regions import Bounds, Region, Specification
from redan.certification.rounding import SoundFloat
from redan.certification.solvers import Solver
from redan.certification.zonotope import learn

LP_SECONDS = 10.0  # for one neuron
ITERATIONS = 500  # of Adam on the slopes, at most


@dataclass(frozen=True)
class LateMilp:
    """The part of COLT's certificate that goes image by image; the published numbers are the defaults.

    Args:
        refined: which of the layers that ReLUs take is bounded by linear programs, counted from 0: the second.
        iterations: of Adam on the slopes, for each wrong class.
        last_layers: how many ReLU layers at the end may have exact ones.
        binaries: exact ReLUs of each of these.
        sound: which rounding errors the bounds cover.
        solver: of the programs, see ``solvers.solve``.
        threads: of the solver.
    """

    refined: int = 1
    iterations: int = ITERATIONS
    last_layers: int = 1
    binaries: int = 30
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
            deadline: by ``time.monotonic``.
            tried: is asked of an image ``(*input_shape)`` with a small margin whether it is a counterexample, which
                ends the search.
        """
        layers = {i: (low.cpu().double(), high.cpu().double()) for i, (low, high) in bounds.layers.items()}
        if len(network.bent) > self.refined:
            position = network.bent[self.refined]
            low, high = lp_refine(
                network,
                region,
                layers,
                position,
                image=0,
                sound=self.sound,
                solver=self.solver,
                timeout=LP_SECONDS,
                deadline=deadline,
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
            network, region, specification.row(row), iterations=self.iterations, sound=self.sound, given=layers
        )
        if learned.bounds.margins[0, 0] > 0:
            return True
        tighter = {
            i: (torch.maximum(low, learned.bounds.layers[i][0]), torch.minimum(high, learned.bounds.layers[i][1]))
            for i, (low, high) in layers.items()
        }
        found = minimise(
            network,
            region,
            specification,
            tighter,
            image=0,
            rows=[row],
            binaries=Binaries(last_layers=self.last_layers, per_layer=self.binaries, priorities=learned.urgency),
            sound=self.sound,
            solver=self.solver,
            timeout=max(0.0, deadline - time.monotonic()),
            threads=self.threads,
        )
        candidate = found.candidates[0]
        if candidate is not None and tried(candidate):
            return False
        return bool(found.lower[0] > 0)
