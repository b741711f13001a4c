"""Lists of properties as VNN-COMP has them: decided in order, kept line by line, gone on with."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import redan
from redan.certification.building import Builder
from redan.certification.onnx_files import read_onnx, write_onnx
from redan.certification.vnnlib import read_counterexample
from redan.cli import app
from redan.errors import UserError
from redan.evaluation import properties

# A property is violated where the sum of two inputs in [0, 1] reaches a number.
PROPERTY = """(declare-const X_0 Real)
(declare-const X_1 Real)
(declare-const Y_0 Real)
(assert (>= X_0 0))
(assert (<= X_0 1))
(assert (>= X_1 0))
(assert (<= X_1 1))
(assert (>= Y_0 {least}))
"""
LEAST = {"low": 1.5, "high": 2.5, "higher": 3.0}
WORDS = {"low": "violated", "high": "holds", "higher": "holds"}


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """The sum of two inputs as a network, three properties, one of them compressed, and their list."""
    b = Builder((2,))
    write_onnx(b.network(b.linear(0, torch.ones(1, 2), None)), tmp_path / "sum.onnx")
    for name, least in LEAST.items():
        (tmp_path / f"{name}.vnnlib").write_text(PROPERTY.format(least=least))
    packed = tmp_path / "high.vnnlib"
    (tmp_path / "high.vnnlib.gz").write_bytes(gzip.compress(packed.read_bytes()))
    packed.unlink()
    path = tmp_path / "instances.csv"
    path.write_text("".join(f"sum.onnx,{name}.vnnlib,5\n" for name in LEAST))
    return path


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["certify", *map(str, arguments)])


def test_each_instance_is_decided(listed: Path, tmp_path: Path) -> None:
    done = run(listed, "--method", "crown", "--out", tmp_path / "out", "--json")
    assert done.exit_code == 0, done.stderr
    decisions = json.loads(done.stdout)["decisions"]
    assert [(it["property"], it["verdict"]) for it in decisions] == [(f"{k}.vnnlib", v) for k, v in WORDS.items()]
    lines = (tmp_path / "out" / "results.csv").read_text().splitlines()
    assert [line.split(",")[:3] for line in lines] == [["sum.onnx", f"{k}.vnnlib", v] for k, v in WORDS.items()]
    inputs, outputs = read_counterexample(tmp_path / "out" / "sum-low.counterexample")
    assert float(inputs.sum()) >= 1.5 and float(outputs) == pytest.approx(float(inputs.sum()))
    assert not (tmp_path / "out" / "sum-high.counterexample").exists()
    shown = run(listed)
    assert shown.exit_code == 0 and shown.stdout.count("holds") == 2 and shown.stdout.count("violated") == 1


def test_what_is_decided_is_not_decided_again(listed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decide, out, asked = properties.decide, tmp_path / "out", list[str]()

    def stopping(network: Path, vnnlib: Path, **options: Any) -> properties.Decision:
        asked.append(vnnlib.name)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return decide(network, vnnlib, **options)

    monkeypatch.setattr(properties, "decide", stopping)
    with pytest.raises(KeyboardInterrupt):
        redan.decide_all(listed, out=out, progress=False)
    assert len((out / "results.csv").read_text().splitlines()) == 1
    with pytest.raises(UserError, match="of a list that was stopped; go on with --resume"):
        redan.decide_all(listed, out=out, progress=False)
    found = redan.decide_all(listed, out=out, resume=True, progress=False)
    assert asked == ["low.vnnlib", "high.vnnlib.gz", "high.vnnlib.gz", "higher.vnnlib"]
    assert [it.verdict for it in found] == list(WORDS.values())
    assert found[0].by == redan.decide_all(listed, progress=False)[0].by


def test_packed_networks_are_read(listed: Path, tmp_path: Path) -> None:
    whole = tmp_path / "sum.onnx"
    packed = tmp_path / "sum.onnx.gz"
    packed.write_bytes(gzip.compress(whole.read_bytes()))
    whole.unlink()
    assert float(read_onnx(packed)(torch.tensor([[0.5, 0.25]]).double())) == 0.75
    assert [it.verdict for it in redan.decide_all(listed, progress=False)] == list(WORDS.values())
    packed.write_bytes(b"no gzip")
    with pytest.raises(UserError, match="damaged or no ONNX file"):
        read_onnx(packed)


def test_mistakes(listed: Path, tmp_path: Path) -> None:
    for arguments, message in (
        (("--threat", "linf:0.1"), "leave out what is about test images"),
        (("--timeout", "3"), "instances.csv names properties and seconds"),
        (("--resume",), "there is no results.csv to go on with"),
        (("--solver", "gurobi"), "'gurobi' is not installed"),
        (("--solver", "cplex"), "solver"),
        (("--seed", "1"), "leave out what is about test images"),
    ):
        failed = run(listed, *arguments)
        assert failed.exit_code == 2 and message in failed.stderr and failed.stderr.count("\n") == 1, failed.stderr
    bad = tmp_path / "bad.csv"
    bad.write_text("sum.onnx,low.vnnlib\n")
    assert "bad.csv, line 1: expected network,property,seconds" in run(bad).stderr
    bad.write_text("")
    assert "lists no instances" in run(bad).stderr
    assert "cannot read" in run(tmp_path / "none.csv").stderr
    out = tmp_path / "out"
    redan.decide_all(listed, out=out, progress=False)
    listed.write_text("sum.onnx,high.vnnlib,5\n")
    assert "of other instances" in run(listed, "--out", out, "--resume").stderr
