"""SABR (Mueller et al., ICLR 2023, arXiv:2210.04871): small adversarial bounding boxes.

The worst image of a ball lies in a small part of it. IBP on a small box around an adversarial example says nearly as
much about the worst loss as IBP on the whole ball, and regularises much less.
"""

from typing import Any

from torch import Tensor

from redan.certification.regions import Region
from redan.data.types import Batch
from redan.methods.certified import check
from redan.methods.ibp import IBP
from redan.threats import Linf


class SABR(IBP):
    """IBP on the box of radius ``box r`` around what PGD finds within ``(1 - box) r`` of the image, see ``IBP``.

    Args:
        box: lambda of the paper; above 0, and 1 is IBP.
    """

    def __init__(self, *args: Any, box: float = 0.4, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check(0 < box <= 1, "a box above 0 and up to 1", box)
        self.box = box

    def perturb(self, batch: Batch) -> Tensor:
        """The centres of the boxes."""
        return self.attacked(batch, (1 - self.box) * self.share * self.final)

    def region(self, batch: Batch, adversarial: Tensor, radius: float) -> Region:
        """See ``IBP.region``."""
        return Region.around(adversarial, Linf(self.box * radius))
