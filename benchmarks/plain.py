"""The plain way: adversarial training as it stands in the usual public repositories.

Float32, contiguous memory, the whole ``loss.backward()`` in every attack step, gradients into the parameters. This is
what redan is measured against.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def attack(model: nn.Module, images: Tensor, labels: Tensor, radius: float, step_size: float, steps: int) -> Tensor:
    """Linf PGD from a uniform start, in whatever mode the model is."""
    x = (images + torch.empty_like(images).uniform_(-radius, radius)).clamp(0, 1)
    for _ in range(steps):
        x = x.detach().requires_grad_()
        F.cross_entropy(model(x), labels).backward()
        assert x.grad is not None
        x = x.detach() + step_size * x.grad.sign()
        x = torch.min(torch.max(x, images - radius), images + radius).clamp(0, 1)
    return x.detach()


def training_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    radius: float,
    step_size: float,
    steps: int,
) -> float:
    """One step of PGD adversarial training; returns the loss."""
    adversarial = attack(model, images, labels, radius, step_size, steps)
    optimizer.zero_grad()
    loss = F.cross_entropy(model(adversarial), labels)
    loss.backward()
    optimizer.step()
    return loss.item()
