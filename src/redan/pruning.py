"""Index files by difficulty: the hardest, the easiest or random training images, or all but the hardest.

Class-balanced subsets of the hardest, easiest and random examples follow Liu et al. (JMLR 25, 2024); hard examples with
random ones beside them, and training without the hardest, follow Lee et al. (JMLR 26, 2025).
"""

import shlex
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from redan.data.indices import IndexFile
from redan.data.registry import load_dataset
from redan.data.types import Dataset
from redan.errors import UserError, unknown
from redan.methods.dpls import Measure
from redan.recipes.schema import load_recipe
from redan.run import read_difficulty, read_facts
from redan.seeds import generator

KINDS = ("hard", "easy", "random")


def prune(
    runs: Sequence[str | Path],
    *,
    keep: str | None = None,
    count: int | None = None,
    plus: str | None = None,
    drop_hardest: float | None = None,
    balanced: bool = True,
    seed: int = 0,
    out: str | Path,
    data_dir: str | Path | None = None,
) -> Path:
    """Choose training images by their difficulty in runs with DPLS, for ``data.indices`` of a recipe.

    Images that no run trained on have no difficulty and are left out. Of images as difficult as each other, the first
    in the data set counts as the harder and as the easier one.

    Args:
        runs: run folders, all on one data set; an image's difficulty is the mean over those that know it.
        keep: ``hard``, ``easy`` or ``random``: take ``count`` such images; or else ``drop_hardest``.
        count: how many images to keep.
        plus: ``random:N`` adds N images drawn from the rest; both parts are named in the file's groups.
        drop_hardest: take all but this share, in (0, 1), of the hardest images.
        balanced: as many of each class, within one; of what is dropped, the same share of each class. Without it
            classes do not matter.
        seed: of random choices.
        out: the file to write.
        data_dir: the folder of data sets.

    Returns:
        The file.

    Raises:
        UserError: for a mistake in any of these, where there are too few images, or the file cannot be written.
    """
    if isinstance(runs, str | Path) or not runs:
        raise UserError("runs is a list of at least one run folder")
    added = _check(keep, count, plus, drop_hardest)
    dataset = load_dataset(read_facts(runs[0])[0].data.name, None if data_dir is None else Path(data_dir))
    choice = _Choice(dataset, _mean_difficulty(runs, dataset), balanced, seed)
    groups: dict[str, Tensor] = {}
    if drop_hardest is not None:
        indices = choice.without_hardest(drop_hardest)
    else:
        assert keep is not None and count is not None  # checked above
        groups[keep] = choice.take(keep, count)
        if added:
            groups["random"] = choice.take("random", added)
        indices = torch.cat([*groups.values()])
    words = ["redan", "data", "prune", *map(str, runs)]
    for option, value in (("keep", keep), ("count", count), ("plus", plus), ("drop-hardest", drop_hardest)):
        words += [] if value is None else [f"--{option}", str(value)]
    words += [*([] if balanced else ["--global"]), "--seed", str(seed), "--out", str(out)]
    IndexFile(
        dataset=dataset.name,
        size=len(dataset.train),
        made_by=shlex.join(words),
        indices=_listed(indices),
        groups={name: _listed(members) for name, members in groups.items()},
    ).save(Path(out))
    return Path(out)


def _check(keep: str | None, count: int | None, plus: str | None, drop_hardest: float | None) -> int:
    """Refuse options that do not go together; returns how many random images ``plus`` adds."""
    if (keep is None) == (drop_hardest is None):
        raise UserError(f"say which images: --keep {', '.join(KINDS)} with --count, or else --drop-hardest SHARE")
    if drop_hardest is not None:
        if not 0 < drop_hardest < 1:
            raise UserError(f"--drop-hardest is a share between 0 and 1, such as 0.1, got {drop_hardest}")
        if count is not None or plus is not None:
            raise UserError("--count and --plus go with --keep; --drop-hardest takes all the rest")
        return 0
    if keep not in KINDS:
        raise unknown("choice for --keep", str(keep), KINDS)
    if count is None or count < 1:
        raise UserError(f"--keep {keep} needs --count, at least 1" + ("" if count is None else f", got {count}"))
    if plus is None:
        return 0
    kind, _, number = plus.partition(":")
    if kind != "random" or not number.isdecimal() or not int(number):
        raise UserError(f"--plus is written random:N, such as random:5000, got {plus!r}")
    if keep == "random":
        raise UserError(f"--keep random --plus {plus} is all random; ask for more by --count")
    return int(number)


def _mean_difficulty(runs: Sequence[str | Path], dataset: Dataset) -> Tensor:
    """The mean difficulty ``(training images,)`` over the runs that know an image, NaN where none does."""
    found = []
    measure: Measure | None = None
    for run in runs:
        found.append(read_difficulty(run, dataset, measure=measure))
        dpls = load_recipe(run).dpls
        measure = None if dpls is None else dpls.difficulty  # all of one measure
    mean = torch.stack(found).nanmean(0)
    if missing := int(mean.isnan().sum()):
        warnings.warn(f"{missing} of {len(mean)} training images are known to no run and left out", stacklevel=3)
    return mean


class _Choice:
    """Images of known difficulty, each taken once; where classes do not matter, all are of one class."""

    def __init__(self, dataset: Dataset, difficulty: Tensor, balanced: bool, seed: int) -> None:
        labels = dataset.train.labels
        self._names = [f"class {name}" for name in dataset.class_names] if balanced else ["all classes"]
        self._classes = labels if balanced else torch.zeros_like(labels)
        self._difficulty, self._seed = difficulty, seed
        self._left = (~difficulty.isnan()).nonzero().squeeze(1)

    def take(self, kind: str, count: int) -> Tensor:
        """Positions of ``count`` images of a kind, as many of each class, within one."""
        scores = self._difficulty[self._left]
        if kind == "easy":
            scores = -scores
        elif kind == "random":
            scores = torch.rand(len(scores), generator=generator(self._seed, "prune"))
        parts = len(self._names)
        counts = [count // parts + (k < count % parts) for k in range(parts)]
        for name, wanted, there in zip(self._names, counts, self._sizes().tolist(), strict=True):
            if wanted > there:
                raise UserError(f"{name}: {there} images of known difficulty are left, {wanted} were asked for")
        return self._highest(scores, counts)

    def without_hardest(self, share: float) -> Tensor:
        """Positions of all but the hardest ``share`` of each class; what is dropped adds up to the share of all."""
        ends = (share * self._sizes().cumsum(0).double()).round().long()
        self._highest(self._difficulty[self._left], ends.diff(prepend=torch.zeros(1, dtype=torch.int64)).tolist())
        if not len(self._left):
            raise UserError(f"--drop-hardest {share} leaves no images")
        return self._left

    def _sizes(self) -> Tensor:
        return self._classes[self._left].bincount(minlength=len(self._names))

    def _highest(self, scores: Tensor, counts: list[int]) -> Tensor:
        """Take those of the highest scores, so many of each class."""
        order = scores.argsort(descending=True, stable=True)
        classes = self._classes[self._left][order]
        taken = torch.cat([order[classes == k][:count] for k, count in enumerate(counts)])
        chosen = self._left[taken]
        rest = torch.ones(len(self._left), dtype=torch.bool)
        rest[taken] = False
        self._left = self._left[rest]
        return chosen


def _listed(indices: Tensor) -> tuple[int, ...]:
    return tuple(indices.sort().values.tolist())
