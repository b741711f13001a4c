"""Sweeps: which runs there are, that none is run twice, and that the table says what the rows say."""

import json
import os
import re
import shlex
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from typer.testing import CliRunner, Result

import redan
from redan.cli import app
from redan.errors import UserError
from redan.evaluation.journal import Journal
from redan.evaluation.results import Accuracy
from redan.evaluation.survey import Survey
from redan.evaluation.trials import Trials
from redan.sweeping import grid as sweeping
from redan.sweeping import runs
from redan.sweeping import search as searching
from redan.sweeping.grid import SweepRow, parse_grid, summary
from redan.sweeping.space import load_space, shipped_spaces
from redan.training import trainer

TINY: dict[str, Any] = {"epochs": 1, "model.width": 2, "data.train_samples": 200}
ATTACKED: dict[str, Any] = {"attack": "fgsm", "samples": 20, "progress": False}
TIMES = {"training_seconds", "evaluation_seconds"}


def cli(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["sweep", *map(str, arguments)])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was really trained and evaluated, by name of the run."""
    made: list[str] = []

    def counted_train(recipe: Any, folder: Path, **options: Any) -> Path:
        made.append(f"train {folder.name}")
        return trainer.train(recipe, folder, **options)

    def counted_evaluate(run: Any, **options: Any) -> Any:
        made.append(f"evaluate {Path(run).name}")
        return redan.evaluate(run, **options)

    monkeypatch.setattr(runs, "train", counted_train)
    monkeypatch.setattr(sweeping, "evaluate", counted_evaluate)
    return made


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Training and evaluation that take no time: a run with seed k classifies 60 + k of 100 images, 40 + k attacked."""
    made: list[str] = []

    def train(recipe: redan.Recipe, folder: Path, **_: Any) -> Path:
        made.append(f"train {folder.name}")
        recipe.save(folder / "recipe.yaml")
        (folder / "model.safetensors").touch()
        (folder / "metrics.jsonl").write_text('{"epoch": 1, "seconds": 1.5}\n{"epoch": 2, "seconds": 2.25}\n')
        return folder

    def evaluate(run: str, **_: Any) -> Any:
        made.append(f"evaluate {Path(run).name}")
        seed = redan.load_recipe(run).seed
        return SimpleNamespace(clean=Accuracy.of(60 + seed, 100), robust=Accuracy.of(40 + seed, 100), seconds=0.5)

    monkeypatch.setattr(runs, "train", train)
    monkeypatch.setattr(sweeping, "evaluate", evaluate)
    return made


def test_rows_are_recipes_by_choices_by_seeds(pretended: list[str], tmp_path: Path) -> None:
    grid: dict[str, Any] = {"attack.steps": [1, 2], "threat": ["linf:1/10", "linf:0.2"]}
    rows = redan.sweep(
        ["pgd-at-digits", "trades-digits"], grid=grid, seeds=(3, 1), out=tmp_path, samples=100, progress=False
    )
    expected = [
        f"{recipe}+steps={steps}+threat=linf_{radius}-seed{seed}"
        for recipe in ("pgd-at-digits", "trades-digits")
        for steps in (1, 2)
        for radius in ("1_10", "0.2")
        for seed in (3, 1)
    ]
    assert [row.name for row in rows] == expected
    assert pretended == [f"{done} {name}" for name in expected for done in ("train", "evaluate")]
    assert {path.name for path in tmp_path.iterdir()} == {*expected, "sweep.json", "sweep.md"}
    first = rows[0]
    assert (first.title, first.recipe, first.seed) == ("pgd-at-digits steps=1 threat=linf:1/10", "pgd-at-digits", 3)
    assert first.overrides == {"attack.steps": 1, "threat": "linf:1/10"}
    assert (first.run, first.threat, first.attack) == (str(tmp_path / expected[0]), "linf:0.1", "pgd-20:cw+apgd")
    assert (first.epochs, first.training_seconds, first.evaluation_seconds) == (2, 3.75, 0.5)
    for row in rows:
        recipe = redan.load_recipe(row.run)
        assert (recipe.seed, recipe.attack.steps) == (row.seed, row.overrides["attack.steps"])
        assert str(recipe.parsed_threat()) == row.threat


def test_keys_that_end_alike_are_written_whole(pretended: list[str], tmp_path: Path) -> None:
    grid: dict[str, Any] = {"attack.steps": [3], "validation.steps": [4], "optimizer.lr": [0.5]}
    (row,) = redan.sweep(["pgd-at-digits"], grid=grid, out=tmp_path, progress=False)
    assert row.name == "pgd-at-digits+attack.steps=3+validation.steps=4+lr=0.5-seed0"


def test_choices_below_an_override_do_not_leak_into_other_rows(pretended: list[str], tmp_path: Path) -> None:
    overrides = {"model": {"name": "small-cnn"}}
    rows = redan.sweep(
        ["pgd-at-digits"], overrides=overrides, grid={"model.width": [2, 4]}, out=tmp_path, progress=False
    )
    assert [row.overrides for row in rows] == [{**overrides, "model.width": width} for width in (2, 4)]
    assert overrides == {"model": {"name": "small-cnn"}}


def test_a_row_says_what_its_run_and_its_evaluation_say(calls: list[str], tmp_path: Path) -> None:
    call: dict[str, Any] = {"overrides": {**TINY, "epochs": 2}, "out": tmp_path / "sweep", **ATTACKED}
    (row,) = rows = redan.sweep(["pgd-at-digits"], seeds=[4], **call)
    direct = redan.evaluate(row.run, attack="fgsm", samples=20, curve=False, out=tmp_path, progress=False)
    assert (row.clean, row.robust, row.samples) == (direct.clean, direct.robust, 20)
    records = [json.loads(line) for line in (Path(row.run) / "metrics.jsonl").read_text().splitlines()]
    assert row.epochs == 2
    assert row.training_seconds == pytest.approx(sum(record["seconds"] for record in records), abs=1e-3)
    assert row.evaluation_seconds is not None and row.evaluation_seconds > 0

    files = {path: path.stat().st_mtime_ns for path in Path(row.run).rglob("*")}
    assert redan.sweep(["pgd-at-digits"], seeds=[4], **call) == rows
    assert calls == ["train pgd-at-digits-seed4", "evaluate pgd-at-digits-seed4"]
    assert files == {path: path.stat().st_mtime_ns for path in Path(row.run).rglob("*")}

    (other,) = redan.sweep(["pgd-at-digits"], seeds=[4], **call | {"samples": 30})
    assert calls[2:] == ["evaluate pgd-at-digits-seed4"]
    assert other.samples == 30 and (other.epochs, other.training_seconds) == (row.epochs, row.training_seconds)
    assert redan.sweep(["pgd-at-digits"], seeds=[4], **call) == rows  # both are kept
    assert len(calls) == 3


def test_a_sweep_grows_and_its_rows_are_found_from_elsewhere(
    pretended: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    redan.sweep(["pgd-at-digits"], out="sweep", progress=False)
    rows = redan.sweep(
        ["standard-digits", "pgd-at-digits"], seeds=(0, 1), out=tmp_path / "sweep", samples=360, progress=False
    )
    assert [call for call in pretended if call.startswith("train")] == [
        "train pgd-at-digits-seed0",
        "train standard-digits-seed0",
        "train standard-digits-seed1",
        "train pgd-at-digits-seed1",
    ]
    assert rows[2].run == str(tmp_path / "sweep" / "pgd-at-digits-seed0")


def test_another_recipe_is_refused_before_any_row_starts(calls: list[str], tmp_path: Path) -> None:
    redan.sweep(["standard-digits"], overrides=TINY, out=tmp_path, **ATTACKED)
    changed = {**TINY, "optimizer.lr": 0.02, "gradient_clip": 1.0, "description": "In other words."}
    with pytest.raises(UserError) as error:
        redan.sweep(["pgd-at-digits", "standard-digits"], overrides=changed, out=tmp_path, **ATTACKED)
    assert str(error.value) == (
        f"{tmp_path / 'standard-digits-seed0'} holds a run of another recipe: optimizer.lr is 0.05 there and 0.02 "
        "here; gradient_clip is null there and 1.0 here; choose another --out"
    )
    assert len(calls) == 2


def stopped_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    real = trainer._Training._train_step

    def step(self: Any, *args: Any) -> None:
        real(self, *args)
        self.stop.requested = True

    monkeypatch.setattr(trainer._Training, "_train_step", step)


def stopped_before_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    def evaluate(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sweeping, "evaluate", evaluate)


def stopped_in_the_second_attack(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Survey.meet

    def meet(self: Survey, work: str, *args: Any) -> None:
        if work.startswith("1-"):
            raise KeyboardInterrupt
        real(self, work, *args)

    monkeypatch.setattr(Survey, "meet", meet)


@pytest.mark.parametrize(
    ("stop", "left_to_do"),
    [
        (stopped_in_training, ["train", "evaluate"]),
        (stopped_before_evaluation, ["evaluate"]),
        (stopped_in_the_second_attack, ["evaluate"]),
    ],
    ids=["in training", "before evaluation", "in evaluation"],
)
def test_the_same_call_goes_on_where_it_was_stopped(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    calls: list[str],
    stop: Callable[[pytest.MonkeyPatch], None],
    left_to_do: list[str],
) -> None:
    call = {"overrides": TINY, **ATTACKED, "attack": "fgsm+pgd-3"}
    (whole,) = redan.sweep(["pgd-at-digits"], out=tmp_path / "whole", **call)
    with monkeypatch.context() as context:
        stop(context)
        with pytest.raises(redan.Stopped, match="stopped in row 1 of 1; the same command goes on"):
            redan.sweep(["pgd-at-digits"], out=tmp_path / "parts", **call)
    if stop is stopped_in_training:
        with pytest.raises(UserError, match="another recipe: optimizer.lr is 0.05 there and 0.02 here"):
            redan.sweep(
                ["pgd-at-digits"],
                out=tmp_path / "parts",
                **call | {"overrides": {**TINY, "optimizer.lr": 0.02}},
            )
    if stop is stopped_in_the_second_attack:
        assert list((tmp_path / "parts").rglob("0-fgsm@*.safetensors"))  # a finished piece, not to be done again
        (fewer,) = redan.sweep(["pgd-at-digits"], out=tmp_path / "parts", **call | {"samples": 10})
        assert fewer.samples == 10 and fewer.error is None
    del calls[:]
    written: list[str] = []
    real = Journal.write

    def write(self: Journal, work: str, *piece: Any) -> None:
        written.append(work)
        real(self, work, *piece)

    monkeypatch.setattr(Journal, "write", write)
    (parts,) = redan.sweep(["pgd-at-digits"], out=tmp_path / "parts", **call)
    assert [made.split()[0] for made in calls] == left_to_do
    assert "1-pgd-3" in written and ("0-fgsm" in written) == (stop is not stopped_in_the_second_attack)
    assert parts.model_dump(exclude=TIMES | {"run"}) == whole.model_dump(exclude=TIMES | {"run"})
    assert not list((tmp_path / "parts").rglob("*.partial"))


def test_a_row_that_fails_stops_no_other_and_is_tried_again(calls: list[str], tmp_path: Path) -> None:
    call: dict[str, Any] = {"overrides": TINY, "grid": {"optimizer.lr": ["1e30", 0.05]}, "out": tmp_path, **ATTACKED}
    bad, good = redan.sweep(["standard-digits"], **call)
    assert bad.error is not None and "the loss is" in bad.error and bad.robust is None
    assert good.error is None and good.robust is not None
    assert f"| {bad.title} | 20 | 0, 1 failed | – | – |" in (tmp_path / "sweep.md").read_text()
    assert f"* {bad.name} failed: {bad.error}" in (tmp_path / "sweep.md").read_text()
    del calls[:]
    assert redan.sweep(["standard-digits"], **call) == [bad, good]
    assert calls == [f"train {bad.name}"]


def test_a_run_that_failed_at_once_may_be_begun_with_another_recipe(tmp_path: Path) -> None:
    (bad,) = redan.sweep(["standard-digits"], overrides={**TINY, "optimizer.lr": 1e30}, out=tmp_path, **ATTACKED)
    (good,) = redan.sweep(["standard-digits"], overrides=TINY, out=tmp_path, **ATTACKED)
    assert bad.error is not None and good.error is None
    assert bad.run == good.run and redan.load_recipe(good.run).optimizer.lr == 0.05


def test_weights_that_are_gone_are_trained_again_only_for_another_evaluation(calls: list[str], tmp_path: Path) -> None:
    rows = redan.sweep(["standard-digits"], overrides=TINY, out=tmp_path, **ATTACKED)
    for path in sorted((tmp_path / "standard-digits-seed0").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    assert redan.sweep(["standard-digits"], overrides=TINY, out=tmp_path, **ATTACKED) == rows
    assert len(calls) == 2
    (again,) = redan.sweep(["standard-digits"], overrides=TINY, out=tmp_path, **ATTACKED | {"samples": 21})
    assert calls[2:] == ["train standard-digits-seed0", "evaluate standard-digits-seed0"] and again.error is None


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ("standard-digits pgd-at-digit", "did you mean 'pgd-at-digits'?"),
        ("standard-digits --grid optimizer.lr=0.1 --grid optimzer.lr=0.2", "did you mean 'optimizer'?"),
        ("standard-digits --grid epochs=1,2,many", "got 'many'"),
        ("standard-digits --grid epochs=1 --grid epochs=2", "twice"),
        ("standard-digits --grid epochs=", "KEY=V1,V2"),
        ("standard-digits --grid epochs", "KEY=V1,V2"),
        ("standard-digits --grid =1", "KEY=V1,V2"),
        ("standard-digits --grid epochs=1]", "KEY=V1,V2"),
        ("standard-digits --grid name=2020-01-01", "numbers, text"),
        ("standard-digits -o epochs=1 --grid epochs=2", "leave one of them out"),
        ("standard-digits -o seed=1", "--seeds"),
        ("standard-digits --grid seed=1,2", "--seeds"),
        ("standard-digits --seeds 0,one", "whole numbers"),
        ("standard-digits --seeds -1", "seed"),
        ("standard-digits --seeds 1,1", "rows 1 and 2 are the same run"),
        ("standard-digits standard-digits", "rows 1 and 2 are the same run"),
        ("standard-digits --grid optimizer.lr=0.1,0.2,1e-1", "rows 1 and 3 are the same run"),
        ("standard-digits pgd-at-digits -o name=mine", "would share the folder mine-seed0"),
        (f"standard-digits -o name={'x' * 250}", "longer than 255"),
        ("standard-digits --attack pdg", "did you mean 'pgd'?"),
        ("standard-digits --samples 0", "between 1 and 360"),
        ("standard-digits --samples 361", "between 1 and 360"),
        ("standard-digits standard-cifar10-mini --data-dir no-such-folder", "no-such-folder"),
        ("standard-digits --out taken", "taken"),
    ],
)
def test_a_mistake_costs_no_training(
    pretended: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, hint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").touch()
    done = cli(*arguments.split())
    assert done.exit_code == 2
    assert done.stdout == ""
    assert hint in done.stderr
    assert done.stderr.count("\n") == 1
    assert not pretended
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_mistakes_of_python_callers(pretended: list[str], tmp_path: Path) -> None:
    mistakes: list[tuple[dict[str, Any], str]] = [
        ({"recipes": "pgd-at-digits"}, r"a list, such as \['pgd-at-digits'\]"),
        ({"recipes": []}, "at least one recipe"),
        ({"seeds": ()}, "at least one seed"),
        ({"grid": {"epochs": 3}}, "a list of values for epochs, got 3"),
        ({"grid": {"epochs": []}}, "a list of values for epochs"),
        ({"overrides": {"epochs": {1, 2}}}, "epochs takes numbers"),
    ]
    for mistake, hint in mistakes:
        with pytest.raises(UserError, match=hint):
            redan.sweep(**{"recipes": ["pgd-at-digits"], "out": tmp_path / "sweep", **mistake})
    assert not pretended and not (tmp_path / "sweep").exists()


def test_a_damaged_book_is_named(pretended: list[str], tmp_path: Path) -> None:
    redan.sweep(["pgd-at-digits"], out=tmp_path, progress=False)
    book = tmp_path / "sweep.json"
    book.write_bytes(book.read_bytes()[:-40])
    with pytest.raises(UserError, match="is not a sweep of redan's") as error:
        redan.sweep(["pgd-at-digits"], out=tmp_path, progress=False)
    assert str(book) in str(error.value) and "\n" not in str(error.value)


def test_a_grid_is_read_as_yaml() -> None:
    assert parse_grid(["optimizer.lr=0.1,1.0e-2", "method.layers=[a,b],[c]", "threat=linf:4/255,l2:0.5"]) == {
        "optimizer.lr": [0.1, 0.01],
        "method.layers": [["a", "b"], ["c"]],
        "threat": ["linf:4/255", "l2:0.5"],
    }
    assert parse_grid(["model={name: resnet18, width: 2},small-cnn", "attack.start=null"]) == {
        "model": [{"name": "resnet18", "width": 2}, "small-cnn"],
        "attack.start": [None],
    }


def row(title: str, seed: int, correct: int | None, *, threat: str = "linf:0.1", error: str | None = None) -> SweepRow:
    accuracy = None if correct is None else Accuracy.of(correct, 1000)
    return SweepRow(
        title=title,
        recipe=title.split()[0],
        seed=seed,
        overrides={},
        run=f"{title}-seed{seed}",
        threat=threat,
        attack="fgsm",
        samples=1000,
        clean=accuracy,
        robust=accuracy,
        error=error,
    )


def test_the_table_has_the_mean_and_sample_deviation_over_seeds() -> None:
    rows = [row("a", 0, 500), row("b x=1", 0, 510), row("a", 1, 520), row("a", 2, 600), row("c", 0, None)]
    rows += [row("b x=1", 1, None, error="the loss is nan")]
    # 50, 52 and 60 %: mean 54, squared deviations 16 + 4 + 36 over 2, so 28 under the root
    spread = f"54.0 ± {28**0.5:.1f} %"
    header, lines = summary(rows)
    assert header == ("recipe", "images", "seeds", "clean", "robust")
    assert lines == [
        ["a", "1000", "3", spread, spread],
        ["b x=1", "1000", "1, 1 failed", str(Accuracy.of(510, 1000)), str(Accuracy.of(510, 1000))],
        ["c", "1000", "0", "–", "–"],
    ]


def test_the_table_names_the_threats_where_they_differ() -> None:
    header, lines = summary([row("a", 0, 500), row("b", 0, 500, threat="l2:0.5")])
    assert header == ("recipe", "threat", "images", "seeds", "clean", "robust")
    assert [line[1] for line in lines] == ["linf:0.1", "l2:0.5"]


def test_the_written_table_carries_the_command_that_makes_it(pretended: list[str], tmp_path: Path) -> None:
    out = tmp_path / "my sweep"
    options = ["-o", "label_smoothing=0.1", "--grid", "attack.start=null,image", "--grid", "name=a|b,'c, d'"]
    options += ["--grid", "model={name: small-cnn, width: 2},small-cnn", "--seeds", "2,1"]
    options += ["--attack", "pgd-5", "--samples", "100", "--out", str(out)]
    first = cli("pgd-at-digits", *options, "--json")
    assert first.exit_code == 0, first.stderr
    text = (out / "sweep.md").read_text()
    assert "Attack pgd-5 within linf:0.15 on the first 100 test images" in text
    assert r"| a\|b start=null name=a\|b model={name: small-cnn, width: 2} | 100 | 2 | 61.5 ± 0.7 % |" in text
    command = shlex.split(next(line for line in text.splitlines() if line.startswith("redan sweep")))
    del pretended[:]
    again = cli(*command[2:], "--json")
    assert json.loads(again.stdout) == json.loads(first.stdout)
    assert (out / "sweep.md").read_text() == text
    assert pretended == []


def test_brackets_in_a_choice_are_shown(pretended: list[str], tmp_path: Path) -> None:
    done = cli("pgd-at-digits", "--grid", "name='[bold]'", "--out", tmp_path)
    assert "[bold] name=[bold]" in done.stdout


def test_progress_tells_the_row_and_the_time_left(
    pretended: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    redan.sweep(["pgd-at-digits"], seeds=[1], out=tmp_path)
    capsys.readouterr()
    clock = iter([0.0, 3600.0, 3600.0, 3600.0 + 1800.0, 5400.0, 5400.0])  # an hour, half an hour, nothing
    monkeypatch.setattr(sweeping, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    redan.sweep(["pgd-at-digits"], seeds=[0, 1, 2, 3], out=tmp_path)
    assert capsys.readouterr().err.splitlines() == [
        "row 1 of 4: pgd-at-digits seed 0",
        "row 3 of 4: pgd-at-digits seed 2 (about 2.0 h left)",
        "row 4 of 4: pgd-at-digits seed 3 (about 45.0 min left)",
    ]
    redan.sweep(["pgd-at-digits"], seeds=[0, 1, 2, 3], out=tmp_path)
    assert capsys.readouterr().err == ""


def test_the_command_prints_one_json_document_and_fails_with_a_row(tmp_path: Path) -> None:
    options = [word for key, value in TINY.items() for word in ("-o", f"{key}={value}")]
    options += ["--attack", "fgsm", "--samples", "20", "--out", str(tmp_path)]
    done = cli("standard-digits", *options, "--grid", "optimizer.lr=0.05,1e30", "--json")
    assert done.exit_code == 1
    document = json.loads(done.stdout)
    assert document["table"] == str(tmp_path / "sweep.md")
    good, bad = document["rows"]
    assert good.keys() == bad.keys() == SweepRow.model_fields.keys()
    assert good["clean"].keys() == good["robust"].keys() == {"correct", "samples", "value", "low", "high"}
    assert good["overrides"] == {**TINY, "optimizer.lr": 0.05} and good["error"] is None
    assert bad["robust"] is None and "the loss is" in bad["error"]
    assert done.stderr.splitlines()[-1] == "redan: 1 of 2 rows failed; the same command tries them again"
    table = cli("standard-digits", *options, "--grid", "optimizer.lr=0.05")
    assert table.exit_code == 0 and table.stderr == ""
    assert "standard-digits lr=0.05" in table.stdout and "±" not in table.stdout
    assert f"Table: {tmp_path / 'sweep.md'}" in table.stdout
    assert "--json" in cli("--help").stdout


def test_a_stopped_command_says_in_one_line_how_to_go_on(
    pretended: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped_before_evaluation(monkeypatch)
    done = cli("standard-digits", "--seeds", "0,1", "--out", tmp_path)
    assert done.exit_code == 130
    said = done.stderr.splitlines()
    assert said == [
        "row 1 of 2: standard-digits seed 0",
        "redan: stopped in row 1 of 2; the same command goes on",
    ]


def test_a_full_disk_ends_the_sweep_in_one_line_and_keeps_what_is_finished(
    pretended: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, replaced = os.replace, []

    def full(source: str, target: Path) -> None:
        replaced.append(target)
        if len(replaced) > 8:
            raise OSError(28, "No space left on device")
        real(source, target)

    with monkeypatch.context() as context:
        context.setattr(os, "replace", full)
        with pytest.raises(UserError, match="No space left on device"):
            redan.sweep(["standard-digits"], seeds=range(4), out=tmp_path, progress=False)
    done = [call for call in pretended if call.startswith("evaluate")]
    del pretended[:]
    rows = redan.sweep(["standard-digits"], seeds=range(4), out=tmp_path, progress=False)
    assert all(row.error is None and row.robust is not None for row in rows)
    assert done and done[0] not in pretended


def test_what_cannot_be_built_is_told_before_any_row_starts(calls: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="gamma of at least 0, got -1"):
        redan.sweep(["arat-digits"], overrides=TINY, grid={"method.gamma": [1, -1]}, out=tmp_path, **ATTACKED)
    with pytest.raises(UserError, match="rows 1 and 2 are the same run"):
        redan.sweep(["arat-digits"], overrides=TINY, grid={"method.gamma": [1, 1.0]}, out=tmp_path, **ATTACKED)
    assert calls == []


def test_an_analysis_is_added_to_what_is_finished(calls: list[str], tmp_path: Path) -> None:
    method = {"method": {"name": "trades"}} | TINY
    (plain,) = redan.sweep(["pgd-at-digits"], overrides=method, out=tmp_path, **ATTACKED)
    assert plain.analysis is None and "invariance" not in (tmp_path / "sweep.md").read_text()
    (row,) = redan.sweep(["pgd-at-digits"], overrides=method, out=tmp_path, analyse=True, **ATTACKED)
    assert calls == ["train pgd-at-digits-seed0", "evaluate pgd-at-digits-seed0"]
    assert row.analysis is not None and row.model_copy(update={"analysis": None}) == plain
    assert row.analysis.samples == 20
    conflict = row.analysis.conflicts["as trained"]
    (_, (line,)) = summary([row])
    assert line[-3:] == [
        f"{row.analysis.branches['shared'].cosine.mean:.4f}",
        f"{100 * conflict.share.mean:.1f} %",
        f"{conflict.cosine.mean:+.3f}",
    ]
    (again,) = redan.sweep(["pgd-at-digits"], overrides=method, out=tmp_path, analyse=True, **ATTACKED)
    assert again == row and "--analyse" in (tmp_path / "sweep.md").read_text()


def test_best_and_last_stand_beside_each_other(calls: list[str], tmp_path: Path) -> None:
    both = [
        redan.sweep(["pgd-at-digits"], overrides=TINY, out=tmp_path, checkpoint=which, **ATTACKED)[0]
        for which in ("best", "last", "best")
    ]
    assert [row.checkpoint for row in both] == ["best", "last", "best"] and both[0] == both[2]
    assert calls == ["train pgd-at-digits-seed0", *2 * ["evaluate pgd-at-digits-seed0"]]
    assert len(list((tmp_path / "pgd-at-digits-seed0" / "results").glob("*-last-*.json"))) == 1
    redan.sweep(["pgd-at-digits"], overrides=TINY, out=tmp_path, checkpoint="last", **ATTACKED)
    table = (tmp_path / "sweep.md").read_text()
    assert "--checkpoint last" in table and "of the last checkpoint" in table


SPACE: dict[str, Any] = {
    "optimizer.lr": {"low": 0.001, "high": 1.0, "log": True},
    "batch_size": {"low": 50, "high": 200, "step": 50},
    "attack.step_size": {"low": "1/100", "high": 0.1},
    "data.padding": {"low": 0, "high": 3},
    "schedule": {"choices": [{"name": "cosine"}, {"name": "multistep", "milestones": [1, 2]}]},
}
FOUND: dict[str, Any] = {"space": SPACE, "overrides": {"epochs": 2}, "progress": False}


class Killed(BaseException):
    """What no code is prepared for."""


class Pretence:
    """Training that takes no time: a run's score is a function of its recipe, and of how many were begun."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.resumed: list[str] = []
        self.recipes: list[redan.Recipe] = []
        self.score: Callable[[redan.Recipe, int], float] = lambda recipe, _: min(1.0, recipe.optimizer.lr)
        self.at_epoch: Callable[[int, int], None] = lambda begun, epoch: None
        self.phases = 1

    def __call__(
        self, recipe: redan.Recipe, folder: Path, *, resume: bool, on_validation: trainer.OnValidation, **_: Any
    ) -> None:
        self.begun.append(folder.name)
        self.recipes.append(recipe)
        self.resumed += [folder.name] if resume else []
        recipe.save(folder / "recipe.yaml")
        state = folder / "checkpoint" / "state.safetensors"
        done = int(state.read_text()) if state.exists() else 0
        score = round(137 * self.score(recipe, len(self.begun))) / 137
        epochs = recipe.epochs * self.phases
        for epoch in range(done + 1, epochs + 1):
            records = ({"epoch": it + 1, "phase": "training", "loss": 1.0, "seconds": 2.0} for it in range(epoch))
            (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
            (folder / "model.safetensors").touch()
            on_validation(trainer.Validation(epoch, score, score, epoch == epochs))
            state.parent.mkdir(exist_ok=True)
            state.write_text(str(epoch))
            self.at_epoch(len(self.begun), epoch)


@pytest.fixture
def pretence(monkeypatch: pytest.MonkeyPatch) -> Pretence:
    made = Pretence()
    monkeypatch.setattr(runs, "train", made)
    monkeypatch.setattr(searching, "TPESampler", partial(optuna.samplers.TPESampler, n_startup_trials=2))
    return made


def told(found: Trials) -> list[dict[str, Any]]:
    """What a search found, but for where."""
    return [trial.model_dump(exclude={"run"}) for trial in found.trials]


def grow_old(out: Path) -> None:
    """What is running has not been heard of for an hour."""
    with closing(sqlite3.connect(out / "sweep.sqlite")) as database, database:
        database.execute("UPDATE trial_heartbeats SET heartbeat = datetime(heartbeat, '-1 hour')")
        database.execute("UPDATE trials SET datetime_start = datetime(datetime_start, '-1 hour')")


def states(out: Path) -> list[str]:
    """Of all tries in the storage."""
    with closing(sqlite3.connect(out / "sweep.sqlite")) as database:
        return [state for (state,) in database.execute("SELECT state FROM trials ORDER BY trial_id")]


def test_a_search_keeps_its_trials_and_the_best_recipe(pretence: Pretence, tmp_path: Path) -> None:
    found = redan.search("pgd-at-digits", trials=6, out=tmp_path, **FOUND)
    assert [trial.number for trial in found.trials] == list(range(1, 7)) and found.finished == 6
    assert pretence.begun == [f"pgd-at-digits-trial{number:03d}" for number in range(1, 7)]
    for trial, recipe in zip(found.trials, pretence.recipes, strict=True):
        assert trial.run == str(tmp_path / f"pgd-at-digits-trial{trial.number:03d}")
        drawn = trial.parameters
        assert drawn.keys() == SPACE.keys()
        assert (recipe.optimizer.lr, recipe.attack.step_size) == (drawn["optimizer.lr"], drawn["attack.step_size"])
        assert 0.001 <= recipe.optimizer.lr <= 1 and 0.01 <= recipe.attack.step_size <= 0.1
        assert type(drawn["batch_size"]) is int and recipe.batch_size in (50, 100, 150, 200)
        assert type(drawn["data.padding"]) is int and recipe.data.padding in range(4)
        assert drawn["schedule"] in SPACE["schedule"]["choices"] and recipe.schedule.name == drawn["schedule"]["name"]
        assert trial.value == Accuracy.of(round(137 * recipe.optimizer.lr), 137)
        if trial.state == "complete":
            assert (trial.epochs, trial.seconds, trial.error) == (2, 4.0, None)
    best = max(found.trials, key=lambda trial: trial.parameters["optimizer.lr"])
    assert found.best == best
    assert redan.load_recipe(tmp_path / "best.yaml") == redan.load_recipe(best.run)
    assert Trials.load(tmp_path / "sweep.json") == found
    names = {"best.yaml", "space.yaml", "sweep.json", "sweep.md", "sweep.sqlite"}
    assert {path.name for path in tmp_path.iterdir()} == {*names, *pretence.begun}


def test_what_is_drawn_depends_on_the_seed_alone(pretence: Pretence, tmp_path: Path) -> None:
    one, same, other = (
        redan.search("pgd-at-digits", trials=trials, seed=seed, out=tmp_path / name, **FOUND)
        for name, seed, trials in (("one", 3, 5), ("same", 3, 5), ("other", 4, 1))
    )
    assert told(one) == told(same)
    assert one.trials[0].parameters != other.trials[0].parameters
    assert len({trial.parameters["optimizer.lr"] for trial in one.trials}) == 5


def test_trials_counts_all_that_are_finished(pretence: Pretence, tmp_path: Path) -> None:
    redan.search("pgd-at-digits", trials=3, out=tmp_path / "parts", **FOUND)
    parts = redan.search("pgd-at-digits", trials=5, out=tmp_path / "parts", **FOUND)
    assert len(pretence.begun) == 5
    assert redan.search("pgd-at-digits", trials=5, out=tmp_path / "parts", **FOUND) == parts
    assert redan.search("pgd-at-digits", trials=2, out=tmp_path / "parts", **FOUND).finished == 5
    overrides = [f"--override={key}={value}" for key, value in FOUND["overrides"].items()]
    parts_again = ("--space", tmp_path / "parts" / "space.yaml", "--trials", "2", "--out", tmp_path / "parts")
    done = cli("pgd-at-digits", *parts_again, *overrides)
    assert done.exit_code == 0 and "failed" not in done.stderr
    assert len(pretence.begun) == 5
    assert told(redan.search("pgd-at-digits", trials=5, out=tmp_path / "whole", **FOUND)) == told(parts)


@pytest.mark.parametrize("at_once", [False, True])
def test_a_killed_trial_goes_on_at_its_place(
    pretence: Pretence, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: bool
) -> None:
    whole = redan.search("pgd-at-digits", trials=5, pruning=False, out=tmp_path / "whole", **FOUND)
    del pretence.begun[:]

    def kill(begun: int, epoch: int) -> None:
        if (begun, epoch) == (4, 1):
            raise Killed

    pretence.at_epoch = kill
    with pytest.raises(Killed):
        redan.search("pgd-at-digits", trials=5, pruning=False, out=tmp_path / "parts", **FOUND)
    assert states(tmp_path / "parts")[-1] == "RUNNING"
    slept: list[float] = []
    if not at_once:
        grow_old(tmp_path / "parts")

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        grow_old(tmp_path / "parts")

    monkeypatch.setattr(searching, "time", SimpleNamespace(sleep=sleep, monotonic=time.monotonic))
    parts = redan.search("pgd-at-digits", trials=5, pruning=False, out=tmp_path / "parts", **FOUND)
    assert len(slept) == at_once  # it is not known before whether another process has it
    assert pretence.begun[3:] == ["pgd-at-digits-trial004", "pgd-at-digits-trial004", "pgd-at-digits-trial005"]
    assert pretence.resumed == ["pgd-at-digits-trial004"]
    assert told(parts) == told(whole)
    assert "RUNNING" not in states(tmp_path / "parts") and "WAITING" not in states(tmp_path / "parts")


def test_a_trial_killed_before_it_was_heard_of_does_not_run_for_ever(
    pretence: Pretence, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = redan.search("pgd-at-digits", trials=2, out=tmp_path / "whole", **FOUND)
    redan.search("pgd-at-digits", trials=1, out=tmp_path / "parts", **FOUND)
    optuna.load_study(study_name="sweep", storage=f"sqlite:///{tmp_path / 'parts' / 'sweep.sqlite'}").ask()
    grow_old(tmp_path / "parts")
    assert told(redan.search("pgd-at-digits", trials=2, out=tmp_path / "parts", **FOUND)) == told(whole)
    assert "RUNNING" not in states(tmp_path / "parts")


def test_a_process_that_was_silent_for_too_long_loses_its_trial(pretence: Pretence, tmp_path: Path) -> None:
    whole = redan.search("pgd-at-digits", trials=2, out=tmp_path / "whole", **FOUND)
    del pretence.begun[:]

    def sleep(begun: int, epoch: int) -> None:
        if (begun, epoch) == (1, 1):
            grow_old(tmp_path / "parts")
            storage = f"sqlite:///{tmp_path / 'parts' / 'sweep.sqlite'}"
            searching._return_cut_off(searching._opened(storage, tmp_path, "sweep", optuna.pruners.NopPruner()))

    pretence.at_epoch = sleep
    parts = redan.search("pgd-at-digits", trials=2, out=tmp_path / "parts", **FOUND)
    assert pretence.begun == [f"pgd-at-digits-trial{place:03d}" for place in (1, 1, 2)]
    assert told(parts) == told(whole) and states(tmp_path / "parts") == ["FAIL", "COMPLETE", "COMPLETE"]


def test_others_finish_what_they_have_begun(
    pretence: Pretence, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"sqlite:///{tmp_path / 'shared.db'}"

    def another(begun: int, epoch: int) -> None:
        """A second process, while the first is in its first trial; it has the second and awaits the first."""
        if (begun, epoch) == (1, 1):
            waits = iter([None])
            clock = iter(range(0, 1000, 50))
            fast = SimpleNamespace(sleep=lambda _: next(waits), monotonic=lambda: next(clock))
            monkeypatch.setattr(searching, "time", fast)
            with pytest.raises(StopIteration):
                redan.search("pgd-at-digits", trials=2, storage=url, out=tmp_path / "two", **FOUND)

    pretence.at_epoch = another
    pretence.score = lambda _, begun: begun / 10
    found = redan.search("pgd-at-digits", trials=2, storage=url, out=tmp_path / "one", **FOUND)
    assert pretence.begun == ["pgd-at-digits-trial001", "pgd-at-digits-trial002"]
    assert [Path(trial.run).parent.name for trial in found.trials] == ["one", "two"] and found.finished == 2
    assert not (tmp_path / "one" / "sweep.sqlite").exists()
    # The report finds the best run, which lies in the other one's folder.
    assert found.best is not None and Path(found.best.run).parent.name == "two"
    page = redan.report([tmp_path / "one"], tmp_path / "report.html").read_text()
    assert f"{Path(found.best.run).name} is not evaluated yet" in page
    waiting = Trials.load(tmp_path / "two" / "sweep.json")
    assert [trial.state for trial in waiting.trials] == ["running", "complete"]


def test_a_stopped_search_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call: dict[str, Any] = {"space": {"optimizer.lr": {"low": 0.01, "high": 0.1}}, "trials": 1, "progress": False}
    call |= {"overrides": TINY | {"epochs": 2, "validation.every": 1}}
    whole = redan.search("pgd-at-digits", out=tmp_path / "whole", **call)
    with monkeypatch.context() as context:
        stopped_in_training(context)
        with pytest.raises(redan.Stopped, match=r"^stopped in trial 1 of 1; the same command goes on$"):
            redan.search("pgd-at-digits", out=tmp_path / "parts", **call)
    (trial,) = Trials.load(tmp_path / "parts" / "sweep.json").trials
    assert (trial.state, trial.value) == ("waiting", None)
    parts = redan.search("pgd-at-digits", out=tmp_path / "parts", **call)
    assert [trial.model_dump(exclude={"run", "seconds"}) for trial in parts.trials] == [
        trial.model_dump(exclude={"run", "seconds"}) for trial in whole.trials
    ]
    weights = [tmp_path / name / "pgd-at-digits-trial001" / "model.safetensors" for name in ("whole", "parts")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    (trial,) = parts.trials
    records = [json.loads(line) for line in (Path(trial.run) / "metrics.jsonl").read_text().splitlines()]
    robust = max(record["validation_robust_accuracy"] for record in records)
    assert trial.value == Accuracy.of(round(137 * robust), 137) and 0 < robust < 1


# COLT's epochs are those of each of its three phases.
@pytest.mark.parametrize(
    ("recipe", "epochs", "phases", "pruning"),
    [("pgd-at-digits", 8, 1, True), ("pgd-at-digits", 8, 1, False), ("colt-digits", 4, 3, True)],
)
def test_a_trial_that_falls_behind_is_ended_and_leaves_little(
    pretence: Pretence, tmp_path: Path, recipe: str, epochs: int, phases: int, pruning: bool
) -> None:
    pretence.score = lambda _, begun: 0.5 + begun / 100 if begun < 6 else 0.25
    pretence.phases = phases
    call = FOUND | {"overrides": {"epochs": epochs}, "space": {"batch_size": {"low": 50, "high": 200}}}
    found = redan.search(recipe, trials=6, pruning=pruning, out=tmp_path, **call)
    *good, bad = found.trials
    assert all(trial.state == "complete" for trial in good) and found.best == good[-1] and found.finished == 6
    whole = epochs * phases
    assert (bad.state, bad.epochs) == (("pruned", whole // 4 + 1) if pruning else ("complete", whole))
    assert bad.value == Accuracy.of(round(137 * 0.25), 137)
    left = {path.name for path in Path(bad.run).rglob("*") if path.is_file()}
    assert {"recipe.yaml", "metrics.jsonl"} <= left and any("safetensors" in name for name in left) != pruning
    redan.report([Path(bad.run)], tmp_path / "report.html")


def test_a_trial_that_fails_is_not_counted_and_another_is_drawn(
    pretence: Pretence, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(begun: int, epoch: int) -> None:
        if begun in (2, 3):
            raise UserError("the loss is nan")

    pretence.at_epoch = fail
    monkeypatch.chdir(tmp_path)
    Path("space.yaml").write_text("optimizer.lr: {low: 0.01, high: 0.1}")
    command = ["pgd-at-digits", "--space", "space.yaml", "--trials", "3", "--out", "out"]
    done = cli(*command, "--json")
    assert done.exit_code == 1 and len(pretence.begun) == 3
    assert done.stderr.splitlines()[-1] == "redan: 2 of 3 trials failed; the same command draws others"
    document = json.loads(done.stdout)
    assert document["table"] == "out/sweep.md" and document["best"] == "out/best.yaml"
    assert [trial["state"] for trial in document["trials"]] == ["complete", "failed", "failed"]
    assert document["trials"][1]["error"] == "the loss is nan"
    assert "* trial 2 failed: the loss is nan" in Path("out/sweep.md").read_text()
    again = cli(*command)
    assert again.exit_code == 0 and len(pretence.begun) == 5
    assert len({recipe.optimizer.lr for recipe in pretence.recipes}) == 5
    assert "Best recipe: out/best.yaml. Next: redan train out/best.yaml" in again.stdout


def test_the_table_of_a_search_carries_the_command_that_goes_on(pretence: Pretence, tmp_path: Path) -> None:
    found = redan.search("pgd-at-digits", trials=2, seed=5, pruning=False, out=tmp_path / "my out", **FOUND)
    text = (tmp_path / "my out" / "sweep.md").read_text()
    assert found.command in text and "Best: trial" in text
    for trial in found.trials:
        assert f"{trial.parameters['optimizer.lr']:.4g} | {trial.parameters['batch_size']} |" in text
        assert str(trial.value) in text
    del pretence.begun[:]
    again = cli(*shlex.split(found.command)[2:], "--json")  # its space lies in the folder
    assert again.exit_code == 0 and pretence.begun == []
    assert (tmp_path / "my out" / "sweep.md").read_text() == text


def test_progress_of_a_search_tells_values_and_time_left(
    pretence: Pretence, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 100.0, 3700.0, 4000.0, 5800.0, 6000.0, 6001.0])  # an hour, half an hour; the first is a deadline
    monkeypatch.setattr(searching, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    pretence.score = lambda _, begun: begun / 137
    space = {"batch_size": {"low": 50, "high": 200, "step": 50}, "attack.steps": {"low": 1, "high": 3}}
    found = redan.search("pgd-at-digits", space=space, trials=3, overrides={"epochs": 1}, out=tmp_path)
    drawn = [f"batch_size={it.parameters['batch_size']} steps={it.parameters['attack.steps']}" for it in found.trials]
    assert capsys.readouterr().err.splitlines() == [
        f"trial 1 of 3: {drawn[0]}",
        f"trial 1 complete at {Accuracy.of(1, 137)}, the best so far",
        f"trial 2 of 3: {drawn[1]} (about 2.0 h left)",
        f"trial 2 complete at {Accuracy.of(2, 137)}, the best so far",
        f"trial 3 of 3: {drawn[2]} (about 45.0 min left)",
        f"trial 3 complete at {Accuracy.of(3, 137)}, the best so far",
    ]


@pytest.mark.parametrize(
    ("space", "hint"),
    [
        ("optimzer.lr: {low: 0.1, high: 0.2}", "did you mean 'optimizer'?"),
        ("method.betta: {low: 0.1, high: 0.2}", "no option of method pgd-at 'betta'"),
        ("optimizer.lr: {low: 0.2, high: 0.1}", "optimizer.lr: low must be below high, got 0.2 and 0.1"),
        ("optimizer.lr: {low: 0, high: 0.1, log: true}", "log needs a low above 0, got 0"),
        ("optimizer.lr: {low: 0.1, high: 1.0, log: true, step: 0.1}", "log and step exclude each other"),
        ("epochs: {low: 1, high: 5, step: 0}", "step must be above 0"),
        ("epochs: {low: 1, high: 5, step: 5}", "at most high - low, got 5"),
        ("epochs: {low: 1, hihg: 5}", "did you mean 'high'?"),
        ("epochs: {low: 1}", "epochs: high is missing"),
        ("epochs: {low: one, high: 5}", "'one' is not a number"),
        ("epochs: {low: true, high: 5}", "True is not a number"),
        ("epochs: {low: 1, high: .inf}", "finite"),
        ("epochs: {low: 0, high: 5}", "greater than or equal to 1, got 0"),
        ("epochs: {choices: []}", "at least 1 item"),
        ("epochs: {choices: [1, many]}", "got 'many'"),
        ("epochs: {choices: [2020-01-01]}", "numbers, text"),
        ("epochs: {choices: [1], low: 1}", "no key 'low'"),
        ("epochs: 5", "epochs takes {low: ..., high: ...} or {choices: [...]}, got 5"),
        ("- epochs", "not a mapping"),
        ("", "not a mapping"),
        ("epochs: {low: 1", "cannot read the space"),
        ("seed: {low: 1, high: 3}", "a seed is no value to search for"),
        ("label_smoothing: {low: 0.0, high: 0.1}", "leave one of them out"),
        ("method: {choices: [pgd-at, trade]}", "did you mean 'trades'?"),
        ("method: {choices: [{name: colt}]}", "COLT's mixing of 60 epochs is longer than a phase"),
    ],
)
def test_a_wrong_space_is_told_in_one_line(
    pretence: Pretence, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, space: str, hint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("space.yaml").write_text(space)
    done = cli("pgd-at-digits", "--space", "space.yaml", "--trials", "2", "-o", "label_smoothing=0.1")
    assert done.exit_code == 2 and done.stdout == ""
    assert hint in done.stderr and done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["space.yaml"]


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ("--trials 0", "--trials is at least 1, got 0"),
        ("", "a search takes one recipe, --space and --trials"),
        ("standard-digits --trials 2", "a search takes one recipe"),
        ("--trials 2 --grid epochs=1,2", "leave --grid out"),
        ("--trials 2 --seeds 1", "leave --seeds out"),
        ("--trials 2 --samples 10", "leave --samples out"),
        ("--trials 2 -o data.validation_samples=0", "set data.validation_samples"),
        ("--trials 2 --certify crwon", "did you mean 'crown'?"),
        (
            "--trials 2 -o method.name=colt -o model=convmed -o method.mixing=1 -o method.trained_network=nowhere",
            "nowhere",
        ),
        ("--trials 2 --out taken", "taken"),
        ("--trials 2 --storage nonsense", "--storage nonsense: "),
        ("--trials 2 --storage sqlite:///no/such/folder/file", "unable to open database file"),
    ],
)
def test_a_wrong_search_is_told_in_one_line(
    pretence: Pretence, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str, hint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("space.yaml").write_text("optimizer.lr: {low: 0.1, high: 0.2}")
    Path("taken").touch()
    done = cli("pgd-at-digits", *options.split(), "--space", "space.yaml")
    assert done.exit_code == 2 and done.stdout == ""
    assert hint in done.stderr and done.stderr.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"space.yaml", "taken"}
    assert pretence.begun == []


@pytest.mark.parametrize("option", ["--trials 3", "--seed 1", "--storage sqlite:///x", "--no-pruning", "--certify ibp"])
def test_options_of_a_search_need_a_space(tmp_path: Path, option: str) -> None:
    done = cli("pgd-at-digits", *option.split(), "--out", tmp_path / "out")
    assert done.exit_code == 2 and f"{option.split()[0]} is of a search; name its --space" in done.stderr


def test_another_search_is_refused(pretence: Pretence, tmp_path: Path) -> None:
    call = FOUND | {"space": {"optimizer.lr": {"low": 0.1, "high": 0.2}}, "trials": 1, "out": tmp_path}
    redan.search("pgd-at-digits", **call)
    for change, hint in (
        ({"space": {"optimizer.lr": {"low": 0.1, "high": 0.3}}}, "space.optimizer.lr.high is 0.2 there and 0.3 here"),
        ({"overrides": {"epochs": 5}}, "recipe.epochs is 2 there and 5 here"),
        ({"seed": 1}, "seed is 0 there and 1 here"),
        ({"certify": "crown"}, "certify is null there and crown here"),
    ):
        with pytest.raises(UserError, match=re.escape(hint)):
            redan.search("pgd-at-digits", **call | change)
    with pytest.raises(UserError, match="is not a sweep of redan's"):
        redan.sweep(["pgd-at-digits"], out=tmp_path, progress=False)
    assert len(pretence.begun) == 1


def test_a_grid_s_folder_and_a_damaged_storage_are_told(pretence: Pretence, tmp_path: Path) -> None:
    (tmp_path / "sweep.sqlite").write_bytes(b"no database at all" * 100)
    with pytest.raises(UserError, match="cannot be used: file is not a database") as error:
        redan.search("pgd-at-digits", trials=1, out=tmp_path, **FOUND)
    assert "\n" not in str(error.value)
    (tmp_path / "sweep.json").write_text('{"redan_version": "0", "entries": []}')
    with pytest.raises(UserError, match="is not a search of redan's"):
        redan.search("pgd-at-digits", trials=1, out=tmp_path, **FOUND)


def test_a_password_is_shown_nowhere(tmp_path: Path) -> None:
    url = "postgresql+nothing://me:secret@host/name"
    with pytest.raises(UserError) as error:
        redan.search("pgd-at-digits", trials=1, storage=url, out=tmp_path, **FOUND)
    assert "me:***@host" in str(error.value) and "secret" not in str(error.value)


@pytest.mark.parametrize(("threat", "share"), [("linf:0.000001", 1), ("linf:0.9", 0)])
def test_a_search_may_be_judged_by_what_is_certified(tmp_path: Path, threat: str, share: int) -> None:
    space = {"optimizer.lr": {"low": 0.05, "high": 0.1}}
    found = redan.search(
        "standard-digits", space=space, trials=1, overrides=TINY | {"threat": threat}, certify="interval",
        out=tmp_path, progress=False,
    )  # fmt: skip
    (trial,) = found.trials
    (record,) = (json.loads(line) for line in (Path(trial.run) / "metrics.jsonl").read_text().splitlines())
    right = round(137 * record["validation_clean_accuracy"])
    assert trial.value == Accuracy.of(share * right, 137) and right > 10
    assert "--certify interval" in found.command
    page = redan.report([tmp_path], tmp_path / "report.html").read_text()
    assert "held-out images certified by interval of 1 trials against optimizer.lr" in page
    assert "Held-out images certified by interval</th>" in page and "alidation accuracy of" not in page


def test_the_report_of_a_search_has_its_trials(pretence: Pretence, tmp_path: Path) -> None:
    found = redan.search("pgd-at-digits", trials=3, out=tmp_path / "out", **FOUND)
    page = redan.report([tmp_path / "out"], tmp_path / "report.html").read_text()
    assert found.best is not None and f"{Path(found.best.run).name} is not evaluated yet" in page
    assert "validation accuracy of 3 trials against optimizer.lr" in page
    for trial in found.trials:
        assert trial.value is not None
        assert f'<td class="number">{trial.parameters["optimizer.lr"]:.4g}</td>' in page
        assert f"{100 * trial.value.value:.2f} %" in page
    pretence.at_epoch = lambda begun, epoch: (_ for _ in ()).throw(UserError("no luck"))
    redan.search("pgd-at-digits", trials=1, out=tmp_path / "none", **FOUND)
    with pytest.raises(UserError, match="no trial of .* is complete yet; it goes on with: redan sweep"):
        redan.report([tmp_path / "none"], tmp_path / "none.html")


def test_shipped_spaces_are_read_and_go_with_a_recipe() -> None:
    assert list(shipped_spaces()) == ["colt"]
    space = load_space("colt")
    # What the authors' two scripts came to lies inside.
    published = {
        "batch_size": (100, 150),
        "method.start_factor": (1.05,),
        "method.radius_factor": (1.1, 1.2),
        "method.l1": (1e-5, 5e-6),
        "method.stability": (0.005, 0.003),
    }
    assert space.keys() == published.keys()
    for key, values in published.items():
        low, high = space[key].ends()
        assert all(low < it < high for it in values)
    for key, entry in space.items():
        for end in entry.ends():
            redan.load_recipe("colt-digits", {key: end})
    with pytest.raises(UserError, match="did you mean 'colt'"):
        load_space("colts")
