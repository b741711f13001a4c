"""The commands as a newcomer would try them, wrongly too."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from redan.cli import app

runner = CliRunner()


def redan(*arguments: str | Path) -> Result:
    return runner.invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "run"
    done = redan("train", "pgd-at-digits", "-o", "epochs=10", "-o", "validation.every=5", "--out", out, "--json")
    assert done.exit_code == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["run"] == str(out)
    assert [epoch["epoch"] for epoch in document["epochs"]] == list(range(1, 11))
    return out


def test_every_command_explains_itself() -> None:
    for command in ("demo", "train", "evaluate", "analyse", "sweep", "report", "recipes", "data"):
        done = redan(command, "--help")
        assert done.exit_code == 0
        assert "--json" in done.stdout
    assert redan("--version").stdout.strip().count(".") == 2


def test_evaluate_prints_one_json_document(run: Path) -> None:
    done = redan("evaluate", run, "--samples", "50", "--attack", "fgsm+pgd-5", "--json")
    assert done.exit_code == 0, done.stderr
    document = json.loads(done.stdout)
    needed = {
        "samples",
        "threat",
        "clean_accuracy",
        "robust_accuracy",
        "certified_accuracy",
        "attacks",
        "seconds",
        "model_calls",
        "per_image",
    }
    assert needed <= document.keys()
    assert document["samples"] == len(document["per_image"]) == 50
    assert document["certified_accuracy"] is None
    assert document["attacks"].keys() == {"fgsm", "pgd-5", "curve"}


def test_evaluate_prints_a_table_and_findings_exit_with_one(run: Path) -> None:
    done = redan("evaluate", run, "--samples", "20", "--attack", "fgsm", "--no-curve", "--fail-under", "1.0")
    assert done.exit_code == 1
    assert "robust [95 %]" in done.stdout
    assert "below 1.0" in done.stderr
    assert redan("evaluate", run, "--samples", "20", "--attack", "fgsm", "--fail-under", "0").exit_code == 0


def test_report_is_written(run: Path, tmp_path: Path) -> None:
    done = redan("report", run, "--out", tmp_path / "page.html", "--json")
    assert json.loads(done.stdout) == {"report": str(tmp_path / "page.html")}
    assert "</html>" in (tmp_path / "page.html").read_text()


def test_recipes_and_data_are_listed_and_shown(tmp_path: Path) -> None:
    assert "pgd-at-cifar10-mini" in json.loads(redan("recipes", "--json").stdout)
    assert "pgd-at-cifar10-mini" in redan("recipes").stdout
    shown = redan("recipes", "pgd-at-digits", "-o", "seed=7").stdout
    path = tmp_path / "mine.yaml"
    path.write_text(shown)
    assert json.loads(redan("recipes", path, "--json").stdout)["seed"] == 7
    assert "digits" in json.loads(redan("data", "--json").stdout)
    facts = json.loads(redan("data", "digits", "--json").stdout)
    assert facts["training_images"] + facts["test_images"] == 1797
    assert facts["shape"] == [1, 8, 8]
    assert "1437" in redan("data", "digits").stdout


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ("train pgd-at-digit", "did you mean 'pgd-at-digits'?"),
        ("train pgd-at-digits -o optimzer.lr=1", "did you mean 'optimizer'?"),
        ("train pgd-at-digits -o optimizer.lrr=1", "did you mean 'lr'?"),
        ("train pgd-at-digits -o epochs", "KEY=VALUE"),
        ("train pgd-at-digits -o epochs=many", "epochs"),
        ("train pgd-at-digits -o epochs=0", "epochs"),
        ("train pgd-at-digits -o data.name=digit", "did you mean 'digits'?"),
        ("train pgd-at-digits -o model=resnet", "did you mean 'resnet"),
        ("train pgd-at-digits -o model.widht=4", "did you mean 'width'?"),
        ("train pgd-at-digits -o method=pgd", "did you mean 'pgd-at'?"),
        ("train pgd-at-digits -o threat=linf", "NORM:RADIUS"),
        ("train pgd-at-digits -o batch_size=99999", "fewer than a batch"),
        ("train pgd-at-digits -o data.validation_samples=2000", "to choose from"),
        ("train pgd-at-digits -o data.crop=20", "data.crop"),
        ("train pgd-at-digits --data-dir /no/such/folder -o data.name=mnist", "/no/such/folder"),
        ("train missing.yaml", "missing.yaml"),
        ("evaluate no-such-run", "no run folder"),
        ("evaluate {run} --attack pdg", "did you mean 'pgd'?"),
        ("evaluate {run} --threat l3:1", "l1, l2, linf"),
        ("evaluate {run} --threat linf:x", "not a number"),
        ("evaluate {run} --samples 0", "between 1 and 360"),
        ("evaluate {run} --samples 99999", "between 1 and 360"),
        ("evaluate {run} --checkpoint first", "best or last"),
        ("evaluate {run} --data mnits", "did you mean 'mnist'?"),
        ("report no-such-run", "no-such-run"),
        ("data digitz", "did you mean 'digits'?"),
    ],
)
def test_a_mistake_ends_in_one_helpful_line(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, hint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = redan(*arguments.format(run=run).split())
    assert done.exit_code == 2
    assert done.stdout == ""
    assert hint in done.stderr
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())  # nothing half-made


def test_a_run_without_weights_is_named(run: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes((run / "recipe.yaml").read_bytes())
    done = redan("evaluate", tmp_path)
    assert done.exit_code == 2
    assert "has no best weights yet" in done.stderr
    (tmp_path / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes()[:1000])
    done = redan("evaluate", tmp_path)
    assert done.exit_code == 2
    assert "damaged" in done.stderr


@pytest.mark.filterwarnings("ignore:atop-digits draws at random:UserWarning")
def test_the_demo_makes_a_report(tmp_path: Path) -> None:
    done = redan("demo", "--out", tmp_path / "demo", "--json")
    assert done.exit_code == 0, done.stderr
    document = json.loads(done.stdout)
    page = (tmp_path / "demo" / "report.html").read_text()
    assert "Inside the networks" in page and "Hard examples" in page
    standard, *trained, purified, plain, provable = document["evaluations"]
    assert [run["run"] for run in trained] == ["pgd-at-digits", "trades-digits", "dpls-digits", "arat-digits"]
    # What the demo shows: adversarial training pays, far beyond the intervals, at hardly a cost in clean accuracy.
    for robust in trained:
        assert robust["robust"]["low"] > standard["robust"]["high"] + 0.3
        assert robust["clean_accuracy"] > 0.9
    assert purified["run"] == "atop-digits" and "after the attack, purified" in page
    rules = ("Mean", f"Worst of {purified['randomised']['draws']}", "Majority", "Fixed draw")
    assert all(f'<th scope="row">{rule}</th>' in page for rule in rules)
    assert purified["robust"]["low"] > standard["robust"]["high"] + 0.2
    assert purified["randomised"]["robust"]["worst"]["value"] < purified["robust_accuracy"]
    # COLT's accuracy that is proved is far above that of the same network by PGD-AT of the same length.
    assert (plain["run"], provable["run"]) == ("pgd-at-digits-convmed", "colt-digits")
    assert provable["certified"]["low"] > plain["certified"]["high"] + 0.3
    again = redan("demo", "--out", tmp_path / "demo")
    assert again.exit_code == 2
    assert "not an empty folder" in again.stderr


def test_the_module_runs_as_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "redan", "train", "nothing"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("redan: no recipe 'nothing'")
