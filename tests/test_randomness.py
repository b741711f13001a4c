"""Models that draw at random, of which every accuracy is known in closed form."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import redan
from redan.attacks import SearchModel, cw_margin
from redan.attacks.base import Standing
from redan.errors import UserError
from redan.models.purified import Purified
from redan.models.purifiers.base import Purifier
from redan.models.random_transforms import RandomTransform
from redan.threats import Linf

GAPS = (10, 20, 30, 40)


class Noisy(nn.Module):
    """Two classes by the sign of mean - 0.5 + sigma * noise, a draw for each image at each pass."""

    def __init__(self, sigma: float) -> None:
        super().__init__()
        self.sigma = sigma

    def forward(self, images: Tensor) -> Tensor:
        mean = images.flatten(1).mean(1)
        margin = mean - 0.5 + self.sigma * torch.randn(len(images))
        return torch.stack([-margin, margin], 1)


class Fickle(nn.Module):
    """Knows dark from light, with a sure margin, but in one draw of twenty says the contrary."""

    def forward(self, images: Tensor) -> Tensor:
        margin = (images.flatten(1).mean(1) - 0.5) * torch.where(torch.rand(len(images)) < 0.05, -1.0, 1.0)
        return torch.stack([-margin, margin], 1)


@pytest.fixture
def greys(tmp_path: Path) -> str:
    """Test images of grey level 127.5 +- gap, each gap 50 times on either side."""
    from PIL import Image

    for name, sign in (("dark", -1), ("light", 1)):
        for split, copies in (("train", 1), ("test", 25)):
            for i, gap in enumerate(GAPS * copies):
                path = tmp_path / "greys" / split / name / f"{i:03d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (4, 4), (127 + sign * gap,) * 3).save(path)
    return f"folder:{tmp_path / 'greys'}"


def normal_cdf(z: float) -> float:
    return 0.5 * (1 + math.erf(z / math.sqrt(2)))


def test_accuracies_of_a_noisy_threshold_are_those_of_the_normal_distribution(greys: str) -> None:
    sigma, radius, draws = 15 / 255, 12 / 255, 20
    with pytest.warns(UserWarning, match="draws at random"):
        found = redan.evaluate(
            Noisy(sigma), data=greys, threat=Linf(radius), attack="pgd-5:cw", draws=draws, progress=False
        )
    assert found.randomised is not None
    # An image gap away from the middle is right with probability Phi(gap / sigma); the attack takes radius off the gap.
    margins = [(sign * (127 + sign * gap) - sign * 127.5) / 255 for gap in GAPS for sign in (-1, 1)]
    n = found.samples
    for counts, shift in ((found.randomised.clean, 0.0), (found.randomised.robust, radius)):
        right = [normal_cdf((margin - shift) / sigma) for margin in margins]
        spread = 4 * math.sqrt(sum(p * (1 - p) for p in right) / len(right) / n / draws)
        # Twenty draws choose among candidates, and luck has them choose a weaker one at times.
        luck = 0.05 if shift else 0.0
        assert -spread - 1 / n < counts.mean.value - sum(right) / len(right) < spread + luck + 1 / n
        all_right = sum(p**draws for p in right) / len(right)
        width = 4 * math.sqrt(all_right * (1 - all_right) / n) + 1 / n
        assert -width < counts.worst.value - all_right < width + luck
        assert counts.worst.value <= counts.mean.value <= 1
        assert counts.worst.value <= counts.majority.value
        # One draw, fixed and known: right with the same probability, each image with a draw of its own.
        assert abs(counts.fixed.value - sum(right) / len(right)) < 0.12
    assert found.clean == found.randomised.clean.mean and found.robust == found.randomised.robust.mean
    assert found.curve == ()


def bars(folder: Path, levels: dict[str, int], copies: int) -> str:
    """Images of 8 x 8 with a bar of that grey level in the middle, by class."""
    from PIL import Image

    for name, level in levels.items():
        for split in ("train", "test"):
            for i in range(copies):
                path = folder / split / name / f"{i:03d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                image = Image.new("RGB", (8, 8))
                image.paste((level, level, level), (3, 0, 5, 8))
                image.save(path)
    return f"folder:{folder}"


def test_who_knows_the_draw_moves_pixels_to_the_side_that_it_fears(tmp_path: Path) -> None:
    class Torn(nn.Module):
        """Sure of dark and light while the bar is in the middle; each draw fears one of the sides."""

        def forward(self, images: Tensor) -> Tensor:
            side = (images * torch.linspace(-1, 1, 8)).mean((1, 2, 3))
            fear = torch.where(torch.rand(len(images)) < 0.5, -1.0, 1.0)
            light = torch.where(images.flatten(1).amax(1) > 0.6, 1.0, -1.0)
            margin = 100 * light * (0.01 + 0.01 * torch.rand(len(images)) + fear * side)
            return torch.stack([-margin, margin], 1)

    data = bars(tmp_path / "bars", {"dark": 80, "light": 250}, 20)
    with pytest.warns(UserWarning, match="draws at random"):
        found = redan.evaluate(Torn(), data=data, threat="stadv:0.5", attack="stadv-10", draws=6, progress=False)
    assert found.randomised is not None
    assert found.randomised.clean.mean.value == found.randomised.clean.fixed.value == 1
    # A bar on one side is right in half of the draws, and with a draw that is known it is on the wrong one.
    assert abs(found.randomised.robust.mean.value - 0.5) < 4 * math.sqrt(0.25 / 6 / found.samples) + 1 / found.samples
    assert found.randomised.robust.fixed.correct == 0


def test_an_attack_on_the_bare_classifier_may_help_the_network(greys: str) -> None:
    class Negative(Purifier):
        criterion = "l1"

        def attempts(self, images: Tensor, holes: Tensor) -> tuple[Tensor, ...]:
            return (1 - images,)

    class Brightness(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            margin = images.flatten(1).mean(1) - 0.5
            return torch.stack([-margin, margin], 1)

    transform = RandomTransform(size=4, cells=1, sigma=0.0, missing=0.0)
    found = redan.evaluate(
        Purified(transform, Negative(), Brightness()).eval(),
        data=greys,
        threat="linf:15/255",
        attack="purification-5",
        curve=False,
        progress=False,
    )
    # All are taken for the contrary. What darkens light images and lightens dark ones past the middle, a gap of 10 but
    # not of 20, puts these right; as a worst case they stay wrong, and so does the figure after each attack.
    assert found.clean.correct == found.robust.correct == 0
    assert found.transferred is not None
    assert found.transferred.correct == found.samples // len(GAPS) > 0
    assert set(found.attacks.values()) == {0.0}


def test_luck_is_no_defeat(greys: str) -> None:
    with pytest.warns(UserWarning, match="draws at random"):
        found = redan.evaluate(
            Fickle(), data=greys, threat="linf:1/255", attack="pgd-10:cw+apgd-10", draws=20, progress=False
        )
    # No image can be broken; one draw in twenty is wrong wherever one looks, and most draws never are.
    assert found.randomised is not None
    assert found.randomised.robust.majority.value == 1
    assert abs(found.randomised.robust.mean.value - 0.95) < 4 * math.sqrt(0.05 * 0.95 / 20 / found.samples)
    assert {row.verdict for row in found.per_image} <= {"unknown"}
    assert found.randomised.robust.worst.value < 0.6  # 0.95 ** 20 = 0.36 of the images


def test_images_that_most_draws_get_wrong_are_attacked_too(greys: str) -> None:
    # Their few right draws count in the mean, so the attacker must get at these.
    class Biased(Noisy):
        """Takes an image for dark where its mean is below 0.56: wrong in most draws of the faintest light ones."""

        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images - 0.06)

    with pytest.warns(UserWarning, match="draws at random"):
        found = redan.evaluate(
            Biased(0.04), data=greys, threat="linf:20/255", attack="pgd-5:cw", draws=10, progress=False
        )
    wrong = [row for row in found.per_image if row.verdict == "misclassified"]
    assert wrong and any(row.by is not None for row in wrong)


def test_the_worst_candidate_is_kept() -> None:
    """Of what is offered, the image that most draws get wrong; one that all get wrong ends the matter."""

    class Scripted(nn.Module):
        """Misclassifies an image whose first pixel is p in the first 20 p of 20 passes."""

        def __init__(self) -> None:
            super().__init__()
            self.passes = 0

        def forward(self, images: Tensor) -> Tensor:
            wrong = self.passes % 20 < 20 * images[:, 0, 0, 0] - 0.5
            self.passes += 1
            return torch.stack([1 - wrong.float(), wrong.float()], 1)

    center, labels = torch.full((1, 1, 2, 2), 0.5), torch.zeros(1, dtype=torch.int64)
    standing = Standing(Linf(0.5), SearchModel(Scripted(), draws=20), center, labels)
    for first in (0.2, 0.7, 0.4):
        assert standing.settle(torch.full_like(center, first), torch.zeros(1, 2)) is None
    standing.conclude(torch.full_like(center, 0.1))
    assert standing.outcome().images[0, 0, 0, 0] == pytest.approx(0.7)
    assert len(standing) == 1
    standing.settle(torch.ones_like(center), torch.zeros(1, 2))
    assert len(standing) == 0
    assert standing.outcome().images[0, 0, 0, 0] == 1


def test_gradients_are_means_of_the_draws() -> None:
    class Sloped(nn.Module):
        """A slope of 1 or 3 in turn."""

        def __init__(self) -> None:
            super().__init__()
            self.passes = 0

        def forward(self, images: Tensor) -> Tensor:
            self.passes += 1
            z = (1.0 if self.passes % 2 else 3.0) * images.flatten(1).sum(1)
            return torch.stack([torch.zeros_like(z), z], 1)

    search = SearchModel(Sloped(), draws=4, precision="float32")
    search.logits(torch.rand(2, 1, 2, 2))  # prepares
    images = torch.full((2, 1, 2, 2), 0.25)
    logits, values, gradient = search.gradient(images, cw_margin, torch.zeros(2, dtype=torch.int64))
    assert torch.allclose(gradient, torch.full_like(gradient, 2.0))
    assert torch.allclose(values, torch.full((2,), 2.0))
    assert torch.allclose(logits[:, 1], torch.full((2,), 2.0))


def test_autoattack_switches_and_says_so(greys: str) -> None:
    with pytest.warns(UserWarning, match="apgd-ce and apgd-dlr"):
        found = redan.evaluate(
            Noisy(0.1), data=greys, threat="linf:2/255", attack="autoattack", samples=8, draws=2, progress=False
        )
    assert list(found.attacks) == ["apgd-ce", "apgd-dlr"]


def test_plain_networks_are_not_taken_for_random(
    trained: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    found = redan.evaluate(trained, samples=50, attack="fgsm", out=tmp_path, progress=False)
    assert found.randomised is None
    assert not [w for w in recwarn if "random" in str(w.message)]


def test_draws_are_at_least_two(trained: Path) -> None:
    with pytest.raises(UserError, match="--draws"):
        redan.evaluate(trained, draws=1)
    with pytest.raises(UserError, match="at least once"):
        SearchModel(nn.Identity(), draws=0)
