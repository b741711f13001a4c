"""Index files: who is chosen by difficulty, and that training sees those images and no others; wrong labels."""

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner, Result

import redan
from redan.cli import app
from redan.data.indices import IndexFile, read_indices
from redan.data.registry import load_dataset
from redan.data.types import Batch
from redan.errors import Stopped, UserError
from redan.methods.dpls import DPLS
from redan.recipes.build import positions, split
from redan.recipes.schema import Recipe, load_recipe
from redan.run import build_targets
from redan.tensors import load_tensors, save_tensors
from redan.training import trainer

TINY: dict[str, Any] = {
    "epochs": 2,
    "batch_size": 20,
    "attack.steps": 1,
    "validation.steps": 1,
    "data.validation_samples": 100,
    "model.width": 2,
}
DIGITS = load_dataset("digits", None)
LABELS = DIGITS.train.labels.numpy()
SIZE = len(LABELS)
# Every image has a difficulty of its own, in no order.
DIFFICULTY = (1 + np.random.default_rng(0).permutation(SIZE)) / SIZE

MakeRun = Callable[[np.ndarray], Path]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on all training images that measures difficulty."""
    changes = {"epochs": 1, "batch_size": 479, "data.validation_samples": 0}
    dpls = {"dpls": {"first": 0, "warmup": 1, "scale": 0.0}}
    folder = tmp_path_factory.mktemp("prune") / "base"
    return redan.train("pgd-at-digits", folder, overrides=TINY | changes | dpls, progress=False)


@pytest.fixture
def make_run(base: Path, tmp_path: Path) -> MakeRun:
    """Makes a run that found given difficulties; NaN for images that it never saw."""

    def make(difficulty: np.ndarray) -> Path:
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        shutil.copytree(base, folder)
        path = folder / "checkpoint" / "state.safetensors"
        tensors, metadata = load_tensors(path)
        total, seen = (next(key for key in tensors if key.endswith(f"targets.{name}")) for name in ("total", "seen"))
        tensors[total] = torch.tensor(3 * np.nan_to_num(difficulty), dtype=torch.float32)
        tensors[seen] = torch.tensor(np.where(np.isnan(difficulty), 0, 3), dtype=torch.int32)
        save_tensors(path, tensors, metadata)
        return folder

    return make


@pytest.fixture
def run(make_run: MakeRun) -> Path:
    return make_run(DIFFICULTY)


def chosen(path: Path) -> list[int]:
    return read_indices(path, DIGITS).tolist()


def groups(path: Path) -> dict[str, list[int]]:
    found: dict[str, list[int]] = json.loads(path.read_text())["groups"]
    return found


def hardest(difficulty: np.ndarray, members: np.ndarray, count: int) -> list[int]:
    return sorted(members, key=lambda i: -difficulty[i])[:count]


def by_class(indices: list[int]) -> list[int]:
    return np.bincount(LABELS[indices], minlength=10).tolist()


def index_file(path: Path, indices: Any, **changes: Any) -> Path:
    content = {"redan_version": "0", "dataset": "digits", "size": SIZE, "made_by": "hand", "indices": indices}
    path.write_text(json.dumps(content | changes))
    return path


# Who is chosen.


@pytest.mark.parametrize(("keep", "sign"), [("hard", 1), ("easy", -1)])
def test_the_hardest_and_the_easiest_of_each_class(run: Path, tmp_path: Path, keep: str, sign: int) -> None:
    path = redan.prune([run], keep=keep, count=103, out=tmp_path / "new" / "file.json")
    expected = [
        i for k in range(10) for i in hardest(sign * DIFFICULTY, np.flatnonzero(k == LABELS), 11 if k < 3 else 10)
    ]
    assert chosen(path) == json.loads(path.read_text())["indices"] == sorted(expected)
    assert groups(path) == {keep: sorted(expected)}


def test_the_hardest_whatever_their_class(run: Path, tmp_path: Path) -> None:
    path = redan.prune([run], keep="hard", count=103, balanced=False, out=tmp_path / "file.json")
    assert chosen(path) == sorted(hardest(DIFFICULTY, np.arange(SIZE), 103))
    assert max(by_class(chosen(path))) - min(by_class(chosen(path))) > 1  # or nothing was tested


def test_random_ones_are_balanced_drawn_by_the_seed_and_not_by_difficulty(run: Path, tmp_path: Path) -> None:
    drawn = [
        chosen(redan.prune([run], keep="random", count=205, seed=seed, out=tmp_path / "file.json"))
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert by_class(drawn[0]) == [21] * 5 + [20] * 5
    assert abs(DIFFICULTY[drawn[0]].mean() - 0.5) < 0.1  # 5 standard errors of a uniform's mean


def test_random_ones_beside_the_hardest_are_of_the_rest_and_both_are_named(run: Path, tmp_path: Path) -> None:
    alone = redan.prune([run], keep="hard", count=1000, out=tmp_path / "alone.json")
    both = redan.prune([run], keep="hard", count=1000, plus="random:200", out=tmp_path / "both.json")
    parts = groups(both)
    assert parts["hard"] == chosen(alone)
    assert by_class(parts["random"]) == [20] * 10
    assert chosen(both) == sorted(parts["hard"] + parts["random"]) and len(set(chosen(both))) == 1200
    other = redan.prune([run], keep="hard", count=1000, plus="random:200", seed=1, out=tmp_path / "other.json")
    assert groups(other)["hard"] == parts["hard"] and groups(other)["random"] != parts["random"]


@pytest.mark.parametrize("share", [0.1, 0.25, 0.999])
def test_all_but_the_hardest_share(run: Path, tmp_path: Path, share: float) -> None:
    path = redan.prune([run], drop_hardest=share, balanced=False, out=tmp_path / "file.json")
    dropped = hardest(DIFFICULTY, np.arange(SIZE), round(share * SIZE))
    assert chosen(path) == sorted(set(range(SIZE)) - set(dropped)) and groups(path) == {}

    path = redan.prune([run], drop_hardest=share, out=tmp_path / "file.json")
    kept = chosen(path)
    assert SIZE - len(kept) == round(share * SIZE)
    for k in range(10):
        members = np.flatnonzero(k == LABELS)
        dropped = sorted(set(members.tolist()) - set(kept))
        assert abs(len(dropped) - share * len(members)) < 1
        assert dropped == sorted(hardest(DIFFICULTY, members, len(dropped)))


def test_difficulty_is_the_mean_over_the_runs_that_know_an_image(make_run: MakeRun, tmp_path: Path) -> None:
    second = 1.5 - 1.4 * DIFFICULTY  # so that the mean's order is the first's turned round
    first, second[::3] = DIFFICULTY.copy(), np.nan
    first[1::3] = np.nan
    first[:60], second[:60] = np.nan, np.nan
    mean = np.nanmean([first[60:], second[60:]], 0)
    with pytest.warns(UserWarning, match=f"^60 of {SIZE} training images are known to no run and left out$"):
        path = redan.prune(
            [make_run(first), make_run(second)], keep="hard", count=300, balanced=False, out=tmp_path / "file.json"
        )
    assert chosen(path) == sorted(60 + i for i in hardest(mean, np.arange(SIZE - 60), 300))


@pytest.mark.parametrize("kind", [{"keep": "easy"}, {"keep": "random"}, {"keep": "hard", "plus": "random:100"}])
def test_images_that_no_run_knows_are_left_out_everywhere(
    make_run: MakeRun, tmp_path: Path, kind: dict[str, str]
) -> None:
    known = np.arange(SIZE) % 2 == 0
    with pytest.warns(UserWarning, match="left out"):
        path = redan.prune([make_run(np.where(known, DIFFICULTY, np.nan))], count=400, **kind, out=tmp_path / "file")  # type: ignore[arg-type]
    assert known[chosen(path)].all()
    with pytest.warns(UserWarning, match="left out"):
        path = redan.prune([make_run(np.where(known, DIFFICULTY, np.nan))], drop_hardest=0.5, out=tmp_path / "file")
    assert known[chosen(path)].all() and len(chosen(path)) == known.sum() - round(0.5 * known.sum())


def test_equally_hard_images_are_taken_in_their_order(make_run: MakeRun, tmp_path: Path) -> None:
    path = redan.prune([make_run(np.full(SIZE, 0.5))], keep="hard", count=7, balanced=False, out=tmp_path / "file")
    assert chosen(path) == list(range(7))


# Difficulties for another run.


def test_sources_that_know_too_little_are_refused(make_run: MakeRun) -> None:
    def known(count: int) -> Tensor:
        source = make_run(np.where(np.arange(SIZE) < count, DIFFICULTY, np.nan))
        asked = recipe(**{"data.validation_samples": 0, "dpls.sources": [str(source)]})
        targets = build_targets(asked, DIGITS)
        assert isinstance(targets, DPLS)
        return targets.difficulty()

    expected = torch.tensor(DIFFICULTY, dtype=torch.float32)
    torch.testing.assert_close(known(SIZE), expected)  # and nothing is said
    half = SIZE // 2 + 1  # of an odd number
    with pytest.warns(UserWarning, match=f"^{SIZE - half} of {SIZE} training images are known to none of dpls.sources"):
        found = known(half)
    torch.testing.assert_close(found[:half], expected[:half])
    torch.testing.assert_close(found[half:], expected[:half].mean().expand(SIZE - half))
    with pytest.raises(UserError, match=f"know {half - 1} of the {SIZE} images .* same data.indices or the same seed"):
        known(half - 1)


# What training makes of a file.


def recipe(**changes: Any) -> Recipe:
    return load_recipe("pgd-at-digits", TINY | changes)


def test_a_recipe_trains_on_the_file_less_what_it_holds_out(tmp_path: Path) -> None:
    wanted = list(range(900, 300, -1))
    path = index_file(tmp_path / "file.json", wanted)
    plain = recipe()
    asked = recipe(**{"data.indices": str(path)})
    assert asked.resolved()["data"]["indices"] == str(path)
    held_out = positions(plain, DIGITS)[1]
    inside, outside = positions(asked, DIGITS)
    assert torch.equal(outside, held_out)
    assert inside.tolist() == sorted(set(wanted) - set(held_out.tolist()))
    lost = len(wanted) - len(inside)
    assert lost > 0
    with pytest.warns(UserWarning, match=f"^{lost} of the 600 images in .* are held out for validation") as said:
        training, validation = split(asked, DIGITS)
    assert len(said) == 1
    assert torch.equal(training.images, DIGITS.train.images[inside]) and len(validation) == 100

    few, _ = positions(recipe(**{"data.indices": str(path), "data.train_samples": 101}), DIGITS)
    assert set(few.tolist()) < set(inside.tolist())
    assert by_class(few.tolist()) == [11] + [10] * 9


def test_nothing_is_said_where_nothing_is_held_out(tmp_path: Path) -> None:
    path = index_file(tmp_path / "file.json", [5, 3])
    training, _ = split(recipe(**{"data.indices": str(path), "data.validation_samples": 0}), DIGITS)
    assert torch.equal(training.images, DIGITS.train.images[[3, 5]])


@pytest.mark.filterwarnings("ignore:.*held out for validation")
def test_training_sees_those_images_with_those_labels_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = recipe(
        **{"data.indices": str(index_file(tmp_path / "file.json", list(range(200)))), "data.wrong_labels": 0.3}
    )
    inside, _ = positions(asked, DIGITS)
    asked = asked.model_copy(update={"batch_size": len(inside), "epochs": 1})
    seen: list[tuple[Tensor, Tensor]] = []
    real = trainer._Training._train_step

    def recording(self: Any, batch: Batch, rate: float) -> None:
        order = batch.indices.argsort()
        seen.append((batch.images[order], batch.labels[order]))
        real(self, batch, rate)

    monkeypatch.setattr(trainer._Training, "_train_step", recording)
    redan.train(asked, tmp_path / "run", progress=False)
    ((images, labels),) = seen
    torch.testing.assert_close(images, DIGITS.train.images[inside].float() / 255)
    assert torch.equal(labels, split(asked, DIGITS)[0].labels)
    assert not torch.equal(labels, DIGITS.train.labels[inside])


@pytest.mark.parametrize(
    ("indices", "changes", "message"),
    [
        ([1, 2], {"dataset": "mnist"}, "is for mnist, not for digits"),
        ([1, 2], {"size": 50000}, f"is for 50000 training images, but digits has {SIZE}"),
        ([1, SIZE], {}, f"names image {SIZE}; those of digits are 0 to {SIZE - 1}"),
        ([-1, 2], {}, "names image -1;"),
        ([10**30], {}, "names image 1000"),
        ([1, 2, 1], {}, "names an image twice"),
        ([], {}, "names no images"),
        ([1.5], {}, "is damaged or no index file: indices.0: "),
        ("all", {}, "is damaged or no index file: indices: "),
        ([1, 2], {"groups": {"hard": ["1"]}}, "is damaged or no index file: groups.hard.0: "),
    ],
)
def test_a_file_that_does_not_fit_is_refused_in_one_line(
    tmp_path: Path, indices: Any, changes: dict[str, Any], message: str
) -> None:
    path = index_file(tmp_path / "file.json", indices, **changes)
    refused(path, message)


def test_a_file_that_cannot_be_read_is_refused_in_one_line(tmp_path: Path) -> None:
    refused(tmp_path / "none.json", "cannot read the index file .*none.json: No such file or directory")
    refused(tmp_path, "cannot read the index file .*: Is a directory")
    whole = index_file(tmp_path / "file.json", [1, 2]).read_bytes()
    (tmp_path / "file.json").write_bytes(whole[:40])
    refused(tmp_path / "file.json", "is damaged or no index file: Invalid JSON")
    (tmp_path / "file.json").write_bytes(b"\xff\xfe")
    refused(tmp_path / "file.json", "is damaged or no index file")


def refused(path: Path, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        redan.train(recipe(**{"data.indices": str(path)}), path.parent / "never", progress=False)
    assert "\n" not in str(error.value)
    assert not (path.parent / "never").exists()


def test_a_file_of_held_out_images_leaves_none(tmp_path: Path) -> None:
    held_out = positions(recipe(), DIGITS)[1]
    path = index_file(tmp_path / "file.json", held_out.tolist())
    refused(path, "all images in .* are held out for validation, none is left")


def test_a_file_may_do_without_groups_and_reads_back(tmp_path: Path) -> None:
    first = IndexFile(dataset="digits", size=SIZE, made_by="hand", indices=(4, 2), groups={"hard": (4,)})
    first.save(tmp_path / "file.json")
    assert IndexFile.model_validate_json((tmp_path / "file.json").read_bytes()) == first
    assert chosen(tmp_path / "file.json") == [2, 4]
    assert chosen(index_file(tmp_path / "bare.json", [1])) == [1]


# Wrong labels.


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.95])
def test_a_share_of_each_class_gets_a_label_that_is_wrong(share: float) -> None:
    asked = recipe(**{"data.wrong_labels": share})
    inside, held_out = positions(asked, DIGITS)
    training, validation = split(asked, DIGITS)
    right = DIGITS.train.labels[inside]
    wrong = training.labels != right
    assert wrong.sum() == round(share * len(inside))
    for k in range(10):
        assert abs(wrong[right == k].sum() - share * (right == k).sum()) <= 1
    assert training.labels.min() >= 0 and training.labels.max() <= 9 and training.labels.dtype == torch.int64
    assert torch.equal(training.images, DIGITS.train.images[inside])
    assert torch.equal(validation.labels, DIGITS.train.labels[held_out])
    assert torch.equal(DIGITS.train.labels, torch.from_numpy(LABELS))
    if share == 0.95:  # uniform over the nine others: 141 each are expected, with a standard deviation of 11
        shifts = ((training.labels - right)[wrong] % 10).bincount(minlength=10)
        assert shifts[0] == 0 and (shifts[1:] - 141).abs().max() < 50


def test_wrong_labels_come_from_the_seed_and_lie_anywhere_in_a_class() -> None:
    right = DIGITS.train.labels
    first, again, other = (
        split(recipe(**{"data.wrong_labels": 0.2, "data.validation_samples": 0, "seed": seed}), DIGITS)[0].labels
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert abs(((first != right) & (other != right)).sum() - 0.04 * SIZE) < 30  # two independent draws; 5 deviations
    where = (first != right).nonzero().squeeze(1).float() / SIZE
    assert abs(where.mean() - 0.5) < 0.1  # 287 uniform draws: 5.9 standard errors
    assert torch.equal(split(recipe(**{"data.validation_samples": 0}), DIGITS)[0].labels, right)


@pytest.mark.filterwarnings("ignore:.*held out for validation")
def test_wrong_labels_are_among_the_indexed_and_what_is_made_of_labels_knows_them(tmp_path: Path) -> None:
    path = index_file(tmp_path / "file.json", list(range(500)))
    changes = {
        "data.indices": str(path),
        "data.wrong_labels": 0.4,
        "dpls": {"control": "permuted", "first": 0, "warmup": 1},
        "data.train_samples": 300,
    }
    asked = recipe(**changes)
    inside, _ = positions(asked, DIGITS)
    labels = split(asked, DIGITS)[0].labels
    assert inside.max() < 500 and (labels != DIGITS.train.labels[inside]).sum() == 120
    targets = build_targets(asked, DIGITS)
    assert isinstance(targets, DPLS)
    assert torch.equal(labels[targets.permutation], labels)


@pytest.mark.filterwarnings("ignore:.*held out for validation")
def test_a_resumed_run_has_the_same_images_and_wrong_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = index_file(tmp_path / "file.json", list(range(100)))
    asked = recipe(**{"data.indices": str(path), "data.wrong_labels": 0.3})
    redan.train(asked, tmp_path / "whole", progress=False)
    real = trainer._Training._train_step

    def stopping(self: Any, *args: Any) -> None:
        real(self, *args)
        self.stop.requested = (self.epoch, self.step) == (1, 1)

    with monkeypatch.context() as context:
        context.setattr(trainer._Training, "_train_step", stopping)
        with pytest.raises(Stopped):
            redan.train(asked, tmp_path / "parts", progress=False)
    index_file(path, list(range(101)))
    with pytest.raises(UserError, match="was begun on other images; .*file.json has changed since"):
        redan.train(tmp_path / "parts", tmp_path / "parts", resume=True, progress=False)
    index_file(path, list(range(100)))
    redan.train(tmp_path / "parts", tmp_path / "parts", resume=True, progress=False)
    whole, parts = ((tmp_path / name / "model-last.safetensors").read_bytes() for name in ("whole", "parts"))
    assert whole == parts


@pytest.mark.parametrize("share", [1.0, -0.1, "half"])
def test_a_share_of_wrong_labels_is_checked(share: Any) -> None:
    with pytest.raises(UserError, match=r"data\.wrong_labels: "):
        recipe(**{"data.wrong_labels": share})


# The command.


def command(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_redan_data_prune_stands_beside_redan_data(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "file.json"
    done = command(
        "data", "prune", run, "--keep", "hard", "--count", "20", "--plus", "random:10", "--out", out, "--json"
    )
    assert done.exit_code == 0, done.stderr
    counts = {"hard": 20, "random": 10}
    assert json.loads(done.stdout) == {
        "file": str(out),
        "dataset": "digits",
        "images": 30,
        "of": SIZE,
        "groups": counts,
    }
    assert {name: len(members) for name, members in groups(out).items()} == counts
    done = command("data", "prune", run, "--drop-hardest", "0.1", "--global", "--seed", "3", "--out", out)
    assert done.exit_code == 0 and f"-o data.indices={out} -o data.train_samples=null" in done.stdout
    assert f"{SIZE - round(0.1 * SIZE)} of {SIZE} training images of digits" in done.stdout

    listed = command("data", "--json")
    assert listed.exit_code == 0 and {"digits", "cifar10"} <= json.loads(listed.stdout).keys()
    assert "folder:PATH" in command("data").stdout
    assert str(SIZE) in command("data", "digits").stdout
    assert json.loads(command("data", "digits", "--json").stdout)["training_images"] == SIZE
    assert json.loads(command("data", "--json", "digits").stdout)["training_images"] == SIZE
    unknown = command("data", "nonsense")
    assert unknown.exit_code == 2 and "no data set 'nonsense'" in unknown.stderr and "Traceback" not in unknown.stderr


def test_help_shows_both_commands() -> None:
    for words in (("--help",), ("data", "--help")):
        assert "data prune" in " ".join(command(*words).stdout.split())
    own = command("data", "prune", "--help").stdout
    assert "data prune [OPTIONS] {RUN}..." in own
    assert all(f"--{name}" in own for name in ("keep", "drop-hardest", "global"))
    assert "NAME" in command("data", "--help").stdout.upper()


def test_the_examples_of_the_help_are_commands(run: Path) -> None:
    lines = [line.split() for line in command("data", "prune", "--help").stdout.splitlines()]
    shown = [words for words in lines if words[:3] == ["redan", "data", "prune"]]
    assert len(shown) == 3
    for words in shown:  # digits are too few for the paper's sizes, which is seen after all else is in order
        done = command(*(run if word == "RUN" else word for word in words[1:]))
        assert done.exit_code == 2 and "images of known difficulty are left" in done.stderr


@pytest.mark.parametrize(
    "options",
    [
        {"keep": "hard", "count": 30},
        {"keep": "easy", "count": 30, "plus": "random:7", "balanced": False, "seed": 5},
        {"drop_hardest": 0.3, "seed": 2},
    ],
)
def test_the_file_names_the_command_that_makes_it_again(run: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    path = redan.prune([run], **options, out=tmp_path / "a file.json")
    first = path.read_bytes()
    words = shlex.split(json.loads(first)["made_by"])
    path.unlink()
    assert words[0] == "redan" and command(*words[1:]).exit_code == 0
    assert path.read_bytes() == first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "say which images: --keep hard, easy, random with --count, or else --drop-hardest SHARE"),
        ("--keep hard --count 5 --drop-hardest 0.1", "say which images"),
        ("--keep hart --count 5", "no choice for --keep 'hart'; did you mean 'hard'?"),
        ("--keep hard", "--keep hard needs --count, at least 1"),
        ("--keep hard --count 0", "--keep hard needs --count, at least 1, got 0"),
        ("--drop-hardest 0.1 --count 5", "--count and --plus go with --keep"),
        ("--drop-hardest 0.1 --plus random:5", "--count and --plus go with --keep"),
        ("--drop-hardest 1", "--drop-hardest is a share between 0 and 1, such as 0.1, got 1.0"),
        ("--drop-hardest nan", "--drop-hardest is a share between 0 and 1"),
        ("--drop-hardest 0.99999", "--drop-hardest 0.99999 leaves no images"),
        ("--keep hard --count 5 --plus easy:5", "--plus is written random:N, such as random:5000, got 'easy:5'"),
        ("--keep hard --count 5 --plus random:0", "--plus is written random:N"),
        ("--keep random --count 5 --plus random:5", "is all random; ask for more by --count"),
        ("--keep hard --count 1430", "class 0: 142 images of known difficulty are left, 143 were asked for"),
        (
            "--keep hard --count 1400 --plus random:38 --global",
            "all classes: 37 images of known difficulty are left, 38",
        ),
    ],
)
def test_mistakes_end_in_one_line_and_no_file(run: Path, tmp_path: Path, arguments: str, message: str) -> None:
    done = command("data", "prune", run, *arguments.split(), "--out", tmp_path / "file.json")
    assert done.exit_code == 2
    assert message in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "file.json").exists()


def test_runs_that_do_not_serve_are_named(make_run: MakeRun, trained: Path, tmp_path: Path) -> None:
    def why(*runs: Path | str) -> str:
        with pytest.raises(UserError) as error:
            redan.prune(list(runs), keep="hard", count=5, out=tmp_path / "file.json")
        assert not (tmp_path / "file.json").exists()
        return str(error.value)

    assert "there is no run folder" in why(tmp_path / "none")
    assert "did not measure difficulty; train it with -o dpls.scale=0" in why(trained)
    assert "has measured no difficulty yet" in why(make_run(DIFFICULTY), make_run(np.full(SIZE, np.nan)))
    assert "runs is a list" in why()
    with pytest.raises(UserError, match="runs is a list"):
        redan.prune("run", keep="hard", count=5, out=tmp_path / "file.json")
    with pytest.raises(UserError, match="cannot write"):
        redan.prune([make_run(DIFFICULTY)], keep="hard", count=5, out=tmp_path)
