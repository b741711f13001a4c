"""The report: what the page says is what the run folders hold, and it is safe, whole and readable anywhere."""

import base64
import html
import io
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from redan.analysis.results import (
    Analysis,
    BranchFound,
    ConflictFound,
    Correlations,
    DifficultEntry,
    Difficulty,
    Fitted,
    Growth,
    GrowthPoint,
    Memorisation,
    NormGap,
)
from redan.errors import UserError
from redan.evaluation.results import (
    Accuracy,
    Certificates,
    CertifiedRow,
    Check,
    ConvergencePoint,
    Counts,
    CurvePoint,
    Evaluation,
    GalleryEntry,
    Randomised,
    Row,
)
from redan.reporting import write_report

VOID = {"meta", "link", "img", "br"}
HOSTILE = '<script>alert("1")</script>'
NAME = 'a"&b<i>'
CLASSES = ("cat", '"><img src="https://example.org/x" onerror="alert(1)">')
BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)


class Page(HTMLParser):
    """A page taken apart; fails where its elements do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "small":
            self.rows[-1][-1] += " "

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data
        if "style" not in self.open:
            self.text += data

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def pictures(self) -> list[np.ndarray]:
        """Each image of the page as uint8 ``(h, w)`` or ``(h, w, 3)``."""
        sources = [str(image["src"]).removeprefix("data:image/png;base64,") for image in self.attributes("img")]
        return [np.asarray(Image.open(io.BytesIO(base64.b64decode(source)))) for source in sources]


def rows(*groups: tuple[str, str | None, list[int]]) -> tuple[Row, ...]:
    """Rows by verdict, what they fell to, and the model calls of each."""
    faces = [(verdict, by, calls) for verdict, by, group in groups for calls in group]
    return tuple(
        Row.model_validate(
            dict(index=i, label=0, prediction=0, confidence=0.9, verdict=verdict, by=by, model_calls=calls)
        )
        for i, (verdict, by, calls) in enumerate(faces)
    )


def evaluation(**changes: object) -> Evaluation:
    values: dict[str, object] = dict(
        redan_version="0", run="run", checkpoint="model.safetensors", dataset="digits", class_names=CLASSES,
        threat="linf:8/255", attack="standard", seed=3, device="cpu", samples=100,
        clean=Accuracy.of(80, 100), robust=Accuracy.of(45, 100), clean_accuracy=0.80, robust_accuracy=0.45,
        attacks={"apgd-ce": 0.51, "square": 0.45}, seconds=12.34, model_calls=12340,
        curve=(CurvePoint(radius=0, accuracy=Accuracy.of(80, 100)),
               CurvePoint(radius=8 / 255, accuracy=Accuracy.of(45, 100))),
        per_image=rows(
            ("falsified", "square", [360] * 6),
            ("unknown", None, [200] * 45),
            ("falsified", "apgd-ce", list(range(26, 55))),  # 40 on average
            ("misclassified", None, [1] * 20),
        ),
    )  # fmt: skip
    return Evaluation.model_validate(values | changes)


def at_random() -> Randomised:
    """What was counted of a model that draws: 78, 70, 80 and 75 clean, 50, 30, 45 and 10 robust, of 100."""
    clean, robust = ([Accuracy.of(correct, 100) for correct in four] for four in ((78, 70, 80, 75), (50, 30, 45, 10)))
    names = ("mean", "worst", "majority", "fixed")
    return Randomised(
        draws=16,
        clean=Counts.model_validate(dict(zip(names, clean, strict=True))),
        robust=Counts.model_validate(dict(zip(names, robust, strict=True))),
    )


def make_run(folder: Path, epochs: int = 4) -> Path:
    """A run that is trained and not evaluated."""
    folder.mkdir(parents=True)
    recipe: dict[str, object] = {
        "name": HOSTILE,
        "data": {"name": "digits"},
        "model": {"name": "convnet"},
        "method": {"name": "pgd-at"},
    }
    recipe |= {"threat": "linf:8/255", "epochs": epochs, "seed": 7, "a key of the future": [1]}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    (folder / "environment.json").write_text(json.dumps({"python": "3.11", "device": HOSTILE, "threads": 1}))
    with (folder / "metrics.jsonl").open("w") as file:
        for epoch in range(1, epochs + 1):
            line: dict[str, object] = {
                "epoch": epoch,
                "phase": "one" if epoch < 3 else "two",
                "loss": 1 / epoch,
                "clean_accuracy": 0.5,
            }
            line["robust_accuracy"] = None
            if epoch == epochs:
                line["validation_clean_accuracy"] = 0.25
            file.write(json.dumps(line) + "\n")
    return folder


def add_result(run: Path, result: Evaluation, name: str = "standard", day: int = 1_700_000_000) -> Path:
    path = run / "results" / f"{name}.json"
    result.save(path)
    os.utime(path, (day, day))
    return path


def add_gallery(run: Path, images: np.ndarray, adversarials: np.ndarray) -> None:
    entries = tuple(
        GalleryEntry(
            index=10 + i, label=0, prediction=0, confidence=0.9, adversarial_prediction=1, adversarial_confidence=0.625
        )
        for i in range(len(images))
    )
    add_result(run, evaluation(gallery=entries))
    save_file({"images": images, "adversarials": adversarials}, run / "results" / "standard.safetensors")


def noise(channels: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two images and the same ones disturbed."""
    generator = np.random.default_rng(seed)
    images = generator.random((2, channels, 5, 6), dtype=np.float32)
    shift = generator.uniform(-0.1, 0.1, images.shape).astype(np.float32)
    return images, np.clip(images + shift, 0, 1)


def report(*runs: Path) -> Page:
    out = write_report(runs, runs[0].parent / "report.html")
    return Page(out.read_text(encoding="utf-8"))


def figures(page: Page) -> list[str]:
    """What each drawing that is read aloud says."""
    return [str(drawing["aria-label"]) for drawing in page.attributes("svg") if "aria-label" in drawing]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with one evaluation, its gallery and a hostile name wherever a name can be."""
    folder = make_run(tmp_path / NAME)
    add_gallery(folder, *noise(3))
    return folder


def test_table_says_what_the_results_say(run: Path) -> None:
    add_result(run, evaluation(certified_accuracy=0.2, threat="l2:0.5", curve=()), "z")
    # The intervals of 80, 45, 51 and 20 of 100 are those of Clopper & Pearson's tables.
    eighty, fortyfive = "80.00 % 70.8 – 87.3", "45.00 % 35.0 – 55.3"
    common = ["digits", "convnet", "pgd-at"]
    rows = report(run).rows
    effort = ["123.4", "12.3"]
    asked = ["100", "linf:8/255", "standard", *common]
    assert rows[1] == [f"{NAME} standard", eighty, fortyfive, "–", *asked, *effort]
    certified = "20.00 % 12.7 – 29.2"
    asked = ["100", "l2:0.5", "standard", *common]
    assert rows[2] == [f"{NAME} z", eighty, fortyfive, certified, *asked, *effort]


def test_waterfall_says_what_the_rows_say(run: Path) -> None:
    result = evaluation(attacks={"apgd-ce": 0.51, "fab": 0.51, "square": 0.45}, curve=(), gallery=())
    add_result(run, result)
    (run / "results" / "standard.safetensors").unlink()
    page = report(run)
    eighty, fifty_one, forty_five = "80.00 % 70.8 – 87.3", "51.00 % 40.8 – 61.1", "45.00 % 35.0 – 55.3"
    assert page.rows[3:] == [
        ["no attack", "", "20", "80 of 100", eighty, "1.0"],
        ["apgd-ce", "", "29", "51 of 100", fifty_one, "40.0"],
        ["fab", "", "0", "51 of 100", fifty_one, "–"],
        ["square", "", "6", "45 of 100", forty_five, "360.0"],
        ["every attack", "", "–", "45 of 100", forty_five, "200.0"],
    ]
    bars = [bar for bar in page.attributes("rect") if "class" in bar]
    assert [(bar["class"], float(bar.get("x") or 0), float(bar["width"] or 0)) for bar in bars] == [
        ("total", 0, 80),
        ("left", 0, 51), ("took", 51, 29),
        ("left", 0, 51),
        ("left", 0, 45), ("took", 45, 6),
        ("total", 0, 45),
    ]  # fmt: skip
    intervals = [re.fullmatch(r"M(\S+) 5H(\S+)", path["d"] or "") for path in page.attributes("path")]
    ends = [[float(end) for end in interval.groups()] for interval in intervals if interval]
    np.testing.assert_allclose(ends, [[70.8, 87.3], [35.0, 55.3]], atol=0.05)


def test_model_that_draws_at_random_is_counted_by_every_rule(run: Path) -> None:
    assert "draw at random" not in report(run).text
    counted = at_random()
    means = {"clean": counted.clean.mean, "robust": counted.robust.mean}
    add_result(run, evaluation(randomised=counted, curve=(), **means), "z")
    page = report(run)
    table = [["Rule", "Clean", "Robust"]]
    table += [["Mean", "78.00 % 68.6 – 85.7", "50.00 % 39.8 – 60.2"]]
    table += [["Worst of 16", "70.00 % 60.0 – 78.8", "30.00 % 21.2 – 40.0"]]
    table += [["Majority", "80.00 % 70.8 – 87.3", "45.00 % 35.0 – 55.3"]]
    table += [["Fixed draw", "75.00 % 65.3 – 83.1", "10.00 % 4.9 – 17.6"]]
    start = page.rows.index(table[0])
    assert page.rows[start : start + 5] == table
    assert f"{NAME}, z, 16 draws" in page.text
    assert page.rows[2][1:3] == table[1][1:]
    # Attack by attack, few images fall in all draws: beside the mean, such a table would only mislead.
    assert sum(row[0] == "no attack" for row in page.rows if row) == 1
    assert page.text.count("--draws 16\n") == page.text.count("--draws") == 1


def test_dpls_is_called_a_reconstruction(run: Path) -> None:
    recipe = json.loads((run / "recipe.yaml").read_text())
    ours = "pgd-at DPLS, reconstructed: confidence"
    for changed, told in (
        ({}, f"{ours} of epochs 4 to 9, min-max, scale 0.4, cap 0.9, control: permuted"),
        ({"sources": ["a", "b"]}, f"{ours} from 2 earlier runs, min-max, scale 0.4, cap 0.9, control: permuted"),
        ({"sources": ["a"], "control": "none"}, f"{ours} from 1 earlier run, min-max, scale 0.4, cap 0.9"),
        ({"min_max": False}, f"{ours} of epochs 4 to 9, strictly proportional, scale 0.4, cap 0.9, control: permuted"),
        ({"scale": 0.0}, "pgd-at"),
    ):
        dpls = {"difficulty": "confidence", "first": 3, "warmup": 9, "min_max": True, "scale": 0.4, "cap": 0.9}
        recipe["dpls"] = {**dpls, "control": "permuted", "sources": [], **changed}
        (run / "recipe.yaml").write_text(json.dumps(recipe))
        assert report(run).rows[1][9] == told


def test_analysis_and_monitor_are_shown(run: Path) -> None:
    spread = {"deviation": 0.0625, "n": 10}
    branch = BranchFound.model_validate(
        dict(
            clean=Accuracy.of(80, 100),
            robust=Accuracy.of(45, 100),
            cosine=dict(mean=0.875, **spread),
            distance=dict(mean=2, **spread),
        )
    )
    conflict = ConflictFound.model_validate(dict(share=dict(mean=0.25, **spread), cosine=dict(mean=-0.5, **spread)))
    Analysis(
        redan_version="0", run="run", checkpoint="last", shipped=HOSTILE,
        method="arat", threat="linf:8/255", attack="pgd-20", seed=0, batches=10,
        batch_size=128, samples=100, conflicts={"as trained": conflict}, branches={HOSTILE: branch},
        norm_gaps=(NormGap(layer=HOSTILE, mean=0.125, scale=0.75),), seconds=1.0,
    ).save(run / "analysis.json")  # fmt: skip
    lines = (run / "metrics.jsonl").read_text().splitlines()
    seen = {"conflict_share": 0.2, "conflict_cosine": -0.1, "bn_variance_clean": 0.5, "bn_variance_adversarial": 0.7}
    (run / "metrics.jsonl").write_text("".join(json.dumps(json.loads(line) | seen) + "\n" for line in lines))
    page = report(run)
    assert [HOSTILE, "80.00 % 70.8 – 87.3", "45.00 % 35.0 – 55.3", "0.8750 ± 0.0625"] in page.rows
    assert ["as trained", "25.00 % ± 6.25", "-0.500 ± 0.062"] in page.rows
    assert [HOSTILE, "0.125", "0.750"] in page.rows
    drawn = " ".join(figures(page))
    for told in ("conflict, %, at the end: classification against invariance 20", "invariance -0.1", "clean 0.5"):
        assert told in drawn
    assert "Inside the networks" in page.text


def test_failed_check_is_told_above_the_results(run: Path) -> None:
    passed = Check(name="more steps", passed=True, figure="45.0 %, then 44.0 %", values={"20": 0.45, "100": 0.44})
    skipped = Check(name="one step", passed=None, figure="no such attack")
    add_result(run, evaluation(diagnostics=(passed, skipped), curve=()), "sound")
    page = report(run)
    assert page.rows[-2:] == [
        ["✓ pass", "more steps45.0 %, then 44.0 %"],
        ["– not applicable", "one stepno such attack"],
    ]
    assert not [box for box in page.attributes("div") if box.get("class") == "notice"]

    failed = Check(name="black box", passed=False, figure="square broke 12 more")
    add_result(run, evaluation(diagnostics=(passed, failed, skipped, failed), curve=()), "masked")
    page = report(run)
    assert ["✗ fail", "black boxsquare broke 12 more"] in page.rows
    tags = [attributes.get("class") or tag for tag, attributes in page.elements]
    assert tags.index("notice") < tags.index("table")
    notice = page.text[page.text.index("The robust accuracy of these is not to be trusted") :].partition("Run")[0]
    assert f"\n{NAME}, masked: black box; black box\n" in notice
    assert "sound" not in notice and "more steps" not in notice
    assert [link["href"] for link in page.attributes("a")] == ["#diagnostics"]
    assert [title["id"] for title in page.attributes("h2") if "id" in title] == ["diagnostics"]


def test_result_of_an_older_redan_is_read(run: Path) -> None:
    path = run / "results" / "standard.json"
    expected = write_report([run], run.parent / "new.html").read_bytes()
    content = json.loads(path.read_text())
    for key in ("randomised", "diagnostics", "precision"):
        del content[key]
    path.write_text(json.dumps(content))
    os.utime(path, (1_700_000_000, 1_700_000_000))
    page = write_report([run], run.parent / "old.html").read_bytes()
    assert page == expected
    assert b"Diagnostics" not in page


def test_page_is_self_contained_and_names_stay_text(run: Path) -> None:
    checks = tuple(Check(name=HOSTILE, passed=passed, figure=CLASSES[1]) for passed in (True, False, None))
    drawn = at_random().model_copy(update={"after": {HOSTILE: 0.45}})
    add_result(run, evaluation(diagnostics=checks, randomised=drawn, curve=()), "<i>")
    page = report(run)
    tags = [tag for tag, _ in page.elements]
    assert "script" not in tags and "i" not in tags
    assert tags.count("img") == 6
    for _, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "xlink:href", "srcset", "action", "data"):
            assert (attributes.get(name) or "#").startswith(("#", "data:"))
    assert not re.search(r"url\((?!#)|@import", (run.parent / "report.html").read_text())
    # The command that trains, the environment; the checks, the notice above the results; the attack.
    assert page.text.count(HOSTILE) == 2 + 4 + 1
    assert page.text.count(CLASSES[1]) == 2 + 3


def test_every_picture_has_its_text(run: Path) -> None:
    page = report(run)
    assert [image["alt"] for image in page.attributes("img")[:2]] == [
        "Test image 10, cat",
        f"Test image 10, after the attack, taken for {CLASSES[1]} 62.5 %",
    ]
    # The bars say nothing that the cells beside them do not say.
    assert all(
        drawing.get("role") == "img" or drawing.get("aria-hidden") == "true" for drawing in page.attributes("svg")
    )
    assert figures(page) == [
        f"Accuracy against radius on digits, linf: {NAME} 80.0 % at 0, 45.0 % at 0.0314",
        f"{NAME} over 4 epochs. Loss, at the end: training 0.25",
        f"{NAME} over 4 epochs. Clean accuracy, %, at the end: training 50, validation 25",
    ]


def test_ids_are_unique(run: Path) -> None:
    other = make_run(run.parent / "other")
    ids = [attributes["id"] for _, attributes in report(run, other).elements if "id" in attributes]
    assert ids and len(ids) == len(set(ids))


def test_same_folders_give_the_same_bytes(run: Path) -> None:
    first = write_report([run], run.parent / "first.html").read_bytes()
    with matplotlib.rc_context({"font.size": 30, "lines.linestyle": "--"}):
        second = write_report([run], run.parent / "second.html").read_bytes()
    assert first == second


@pytest.mark.parametrize("channels", [1, 3])
def test_gallery_shows_the_images_and_their_magnified_difference(tmp_path: Path, channels: int) -> None:
    images, adversarials = noise(channels)
    adversarials[1] = images[1]
    run = make_run(tmp_path / "run")
    add_gallery(run, images, adversarials)
    page = report(run)

    difference = adversarials[0].astype(np.float64) - images[0]
    largest = np.abs(difference).max()
    expected = [images[0], adversarials[0], 0.5 + difference / (2 * largest)]
    expected += [images[1], images[1], np.full_like(images[1], 0.5)]
    for picture, array in zip(page.pictures(), expected, strict=True):
        array = np.rint(255 * array).astype(np.uint8).transpose(1, 2, 0)
        np.testing.assert_array_equal(picture, array[:, :, 0] if channels == 1 else array)
    assert f"difference ×\N{NO-BREAK SPACE}{1 / (2 * largest):.3g}" in page.text


def test_curves_of_one_data_set_and_norm_share_a_figure(run: Path) -> None:
    other = make_run(run.parent / "other", epochs=0)
    add_result(other, evaluation(threat="linf:4/255"), "small")
    add_result(other, evaluation(threat="linf:8/255"), "large")
    add_result(other, evaluation(threat="l2:0.5"), "l2")
    page = report(run, other)
    curves = [label for label in figures(page) if label.startswith("Accuracy against radius")]
    assert [label.partition(":")[0] for label in curves] == [
        "Accuracy against radius on digits, linf",
        "Accuracy against radius on digits, l2",
    ]
    legend = re.findall("[●■▲◆▼] (.+)", page.text)
    assert legend == [NAME, "other, large", "other, small", "other"]


def certificates(*verdicts: tuple[str, str | None], first: int = 0, step: int = 1, **changes: object) -> Certificates:
    facts: dict[str, object] = dict(
        redan_version="0", run="run", checkpoint="best", dataset="digits", threat="linf:8/255", method="cascade",
        sound_float="exact", timeout=60, seed=0, device="cpu", samples=100, shard=(1, 1), seconds=9.0, fingerprint="f",
    )  # fmt: skip
    proofs = [
        CertifiedRow.model_validate(
            dict(index=first + step * i, label=0, prediction=0, verdict=verdict, by=by, seconds=0.25 * (i + 1))
        )
        for i, (verdict, by) in enumerate(verdicts)
    ]
    return Certificates.of(proofs, **facts | changes)


def points(*correct: int, samples: int) -> tuple[CurvePoint, ...]:
    return tuple(CurvePoint(radius=k * 4 / 255, accuracy=Accuracy.of(it, samples)) for k, it in enumerate(correct))


def test_certificates_say_what_was_settled_by_what(run: Path) -> None:
    found = certificates(("certified", "crown"), ("certified", "crown"), ("unknown", "milp"), ("misclassified", None))
    found.save(run / "certificates" / "cascade.json")
    page = report(run)
    assert ["certified", "crown", "2", "0.375", "0.50"] in page.rows
    assert ["unknown", "milp", "1", "0.750", "0.75"] in page.rows
    assert ["misclassified", "–", "1", "1.000", "1.00"] in page.rows
    (row,) = [row for row in page.rows if row[-2:] == ["exact", "60"]]
    assert row[1:5] == ["75.00 % 19.4 – 99.4", "75.00 % 19.4 – 99.4", "50.00 % 6.8 – 93.2", "4 of 100"]


def test_shards_are_joined_where_they_are_of_one_certification(run: Path) -> None:
    for k, other in ((1, "f"), (2, "f"), (3, "g")):
        part = certificates(
            ("certified", "crown"), ("unknown", "milp"), first=k - 1, step=2, samples=4, shard=(k, 2 if k < 3 else 9),
            fingerprint=other, curve=points(2, 1, samples=2),
        )  # fmt: skip
        part.save(run / "certificates" / f"shard{k}.json")
    page = report(run)
    assert sum(row[-2:] == ["exact", "60"] for row in page.rows) == 2
    assert ["certified", "crown", "2", "0.250", "0.25"] in page.rows
    (label,) = [label for label in figures(page) if label.startswith("Accuracy against radius")]
    assert "100.0 % certified at 0, 50.0 % at 0.0157" in label


def test_bracket_is_drawn_of_the_same_images_only(run: Path) -> None:
    proofs = [("unknown", "milp")] * 6 + [("certified", "crown")] * 30 + [("unknown", "milp")] * 64
    lower = points(80, 50, 30, samples=100)
    certificates(*proofs, curve=lower, checkpoint="model.safetensors").save(run / "certificates" / "all.json")
    page = report(run)
    (label,) = [label for label in figures(page) if label.startswith("Accuracy against radius")]
    assert "45.0 % at 0.0314" in label and "80.0 % certified at 0, 30.0 % at 0.0314" in label
    assert page.rows[1][1:4] == ["80.00 % 70.8 – 87.3", "45.00 % 35.0 – 55.3", "30.00 % 21.2 – 40.0"]
    # Of other images the proof is a line by itself, and no bracket.
    certificates(*proofs[:50], curve=points(40, 20, samples=50)).save(run / "certificates" / "all.json")
    page = report(run)
    assert re.findall("[●■▲◆▼] (.+)", page.text) == [f"{NAME}, standard", f"{NAME}, certified by cascade"]


def test_date_is_that_of_the_newest_result(run: Path) -> None:
    add_result(run, evaluation(), "newer", day=1_709_596_800)  # 2024-03-05 00:00 UTC
    assert report(run).attributes("time") == [{"datetime": "2024-03-05"}]


def test_run_that_is_not_evaluated_keeps_its_curves_and_says_so(tmp_path: Path) -> None:
    run = make_run(tmp_path / "my run")
    page = report(run)
    assert f"my run is not evaluated yet: redan evaluate '{run}'" in page.text
    assert len(figures(page)) == 2
    assert page.rows == []


def test_reproduce_gives_recipe_environment_and_commands(run: Path) -> None:
    page = report(run)
    assert "redan train '" + HOSTILE + "'" in page.text
    assert f"redan evaluate '{run}' --threat linf:8/255 --attack standard --samples 100 --seed 3\n" in page.text
    assert (run / "recipe.yaml").read_text() in page.text
    assert re.search(r"seed\s*7", page.text) and re.search(r"python\s*3\.11", page.text)


def test_runs_of_the_same_name_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / parent / "run") for parent in ("a", "b")]
    for run in runs:
        add_result(run, evaluation())
    page = Page(write_report(runs, tmp_path / "report.html").read_text())
    assert [row[0] for row in page.rows[1:3]] == [str(run) for run in runs]


def test_line_cut_by_a_kill_is_ignored(run: Path) -> None:
    whole = write_report([run], run.parent / "whole.html").read_bytes()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 5, "loss": 0.')
    assert write_report([run], run.parent / "cut.html").read_bytes() == whole


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("recipe.yaml", "[", "recipe.yaml is not YAML"),
        ("recipe.yaml", "text", "recipe.yaml is not a recipe"),
        ("environment.json", "{", "environment.json is not JSON"),
        ("metrics.jsonl", '{"epoch": 1}\n{"epo\n{"epoch": 3}\n', "metrics.jsonl, line 2, is not JSON"),
        ("results/standard.json", "{}", "standard.json is not an evaluation"),
        ("results/standard.safetensors", "text", "standard.safetensors is not a safetensors file"),
    ],
)
def test_damaged_file_is_named_in_one_line(run: Path, file: str, content: str, message: str) -> None:
    (run / file).write_text(content)
    with pytest.raises(UserError, match=message) as error:
        write_report([run], run.parent / "report.html")
    assert "\n" not in str(error.value)
    assert not (run.parent / "report.html").exists()


def test_what_a_purifier_makes_of_an_image_stands_between_it_and_the_difference(tmp_path: Path) -> None:
    images, adversarials = noise(3)
    run = make_run(tmp_path / "run")
    add_gallery(run, images, adversarials)
    pictures = {"images": images, "adversarials": adversarials, "purified": images[::-1], "transformed": 1 - images}
    path = run / "results" / "standard.safetensors"
    save_file({name: np.ascontiguousarray(picture) for name, picture in pictures.items()}, path)
    page = report(run)
    shown = page.pictures()
    assert len(shown) == 10
    for got, expected in zip(shown, [images[0], adversarials[0], 1 - images[0], images[1]], strict=False):
        np.testing.assert_allclose(got.transpose(2, 0, 1), 255 * expected, atol=0.51)
    told = [image["alt"] for image in page.attributes("img")[2:4]]
    assert told == ["Test image 10, after the attack, transformed", "Test image 10, after the attack, purified"]

    save_file(pictures | {"purified": images[:1], "transformed": images}, path)
    with pytest.raises(UserError, match="must hold purified of the images' shape"):
        write_report([run], tmp_path / "report.html")


def test_random_models_show_what_each_attack_left_and_whether_it_converged(run: Path) -> None:
    drawn = at_random().model_copy(update={"after": {"transfer": 0.77, "pgd:cw": 0.52}})
    points = [(10, 16, 9), (50, 16, 6), (200, 16, 5), (50, 1, 8), (50, 16, 6), (50, 32, 4)]
    convergence = [ConvergencePoint(steps=s, draws=d, accuracy=Accuracy.of(k, 10)) for s, d, k in points]
    account = "200 steps x EOT 16 & nothing left out"
    add_result(run, evaluation(randomised=drawn, convergence=convergence, account=account, curve=()), "random")
    page = report(run)
    for text in ("transfer", "77.00 %", "52.00 %", "first 10 images", account):
        assert text in page.text
    told = [label for svg in page.attributes("svg") if "accuracy against" in (label := svg.get("aria-label") or "")]
    assert [text.partition("accuracy against ")[2] for text in told] == [
        "steps of PGD, 90.0 % at 10, 50.0 % at 200",
        "draws behind a gradient, 80.0 % at 1, 40.0 % at 32",
    ]


def test_pictures_that_do_not_match_the_gallery_are_refused(run: Path) -> None:
    images, adversarials = noise(3)
    pictures = {"images": images[:1].copy(), "adversarials": adversarials[:1].copy()}
    save_file(pictures, run / "results" / "standard.safetensors")
    with pytest.raises(UserError, match=r"standard.safetensors must hold .*\(2, 1 or 3, h, w\)"):
        report(run)


def test_folder_that_is_not_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run: it has no recipe.yaml"):
        write_report([tmp_path], tmp_path / "report.html")
    with pytest.raises(UserError, match="at least one run"):
        write_report([], tmp_path / "report.html")


def browse(page: Path, *options: str) -> tuple[str, list[str]]:
    """What a headless browser prints for ``page``, and the lines of its console."""
    quiet = "--disable-background-networking --disable-component-update --disable-sync --disable-quic --no-first-run"
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", *quiet.split(), "--enable-logging=stderr"]
    command += ["--v=0", f"--user-data-dir={page.parent / 'profile'}", *options, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on PATH")
def test_browser_finds_no_fault(run: Path) -> None:
    out = write_report([run, make_run(run.parent / ("x" * 150))], run.parent / "report.html")
    screenshot = run.parent / "screenshot.png"
    _, console = browse(out, "--window-size=1200,900", f"--screenshot={screenshot}")
    assert console == []
    assert Image.open(screenshot).size == (1200, 900)


@pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on PATH")
def test_page_never_scrolls_sideways_on_a_phone(run: Path) -> None:
    attacks = {"-".join(["long"] * 20): 0.51, "y" * 150: 0.45}
    checks = tuple(Check(name=word, passed=False, figure=word) for word in ("z" * 150, "many words " * 20))
    wide = evaluation(attack="+".join(attacks), attacks=attacks, randomised=at_random(), diagnostics=checks, curve=())
    add_result(run, wide, "-".join(["wide"] * 20))
    out = write_report([run, make_run(run.parent / ("x" * 150))], run.parent / "report.html")
    # A window cannot be as narrow as a phone, a frame can; the second frame shows that the measure sees a fault.
    frames = (out.read_text(), "<!doctype html><div style='width: 900px'>too wide</div>")
    wrapper = run.parent / "wrapper.html"
    wrapper.write_text(
        "<!doctype html><script>function measure(frame) { const view = frame.contentWindow;"
        " frame.title = view.innerWidth + ' ' + view.document.documentElement.scrollWidth;"
        " console.log('measured') }</script>"
        + "".join(
            f'<iframe width="360" height="800" onload="measure(this)" srcdoc="{html.escape(frame)}"></iframe>'
            for frame in frames
        )
    )
    dom, console = browse(wrapper, "--dump-dom")
    assert len(console) == 2 and all("measured" in line for line in console)
    (inner, scroll), (_, fault) = ([int(n) for n in pair] for pair in re.findall(r'title="(\d+) (\d+)"', dom))
    assert inner == 360 and scroll <= inner < fault


def add_study(run: Path, images: np.ndarray) -> None:
    """A study of hard examples with hostile names; ``images`` are the hardest and the easiest of the second class."""

    def growth(name: str, *radii: float) -> Growth:
        points = (
            GrowthPoint(run=name, radius=radius, easiest=0.125, hardest=0.25 + 10 * radius, mean=0.375)
            for radius in radii
        )
        return Growth(measure=HOSTILE, examples=230, points=tuple(points))

    ends = (("hardest", 0.75, True), ("easiest", 0.0625, False))
    entries = [
        dict(position=40 + i, label=1, wrong_label=wrong, end=end, difficulty=difficulty)
        for i, (end, difficulty, wrong) in enumerate(ends)
    ]
    fitted = [Fitted(group="decile 1", examples=23, before=0.5, after=0.875)]
    fitted += [Fitted(group=HOSTILE, examples=7, before=0.25, after=None)]
    Difficulty(
        redan_version="0", run="run", against=(HOSTILE,), method="pgd-at", threat="linf:8/255", attack="pgd-10",
        seed=0, samples=230, class_names=CLASSES,
        correlations=Correlations(names=("clean", HOSTILE), spearman=((1.0, None), (-0.5, 1.0))),
        growth=growth("run", 0, 8 / 255), training_growth=growth(HOSTILE, 0.25),
        memorisation=Memorisation(before=99, after=110, groups=tuple(fitted)),
        gallery=tuple(DifficultEntry.model_validate(entry) for entry in entries), missing=(HOSTILE,), seconds=1.0,
    ).save(run / "difficulty.json")  # fmt: skip
    save_file({"images": images}, run / "difficulty.safetensors")


def test_hard_examples_are_shown(run: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 5, 6), dtype=np.uint8)
    assert "Hard examples" not in report(run).text
    before = report(run).text.count(HOSTILE)
    add_study(run, images)
    page = report(run)
    assert ["1 clean", "1.000", "–"] in page.rows and [f"2 {HOSTILE}", "-0.500", "1.000"] in page.rows
    assert ["Images", "How many", "Epoch 99", "Epoch 110", "Jump"] in page.rows
    assert ["decile 1", "23", "50.00 %", "87.50 %", "37.50 %"] in page.rows
    assert [HOSTILE, "7", "25.00 %", "–", "–"] in page.rows
    numbers = "hardest tenth 0.250 to 0.564, all 0.375 to 0.375, easiest tenth 0.125 to 0.125"
    assert f"{NAME}, {HOSTILE}, from the least radius to the greatest: {numbers}" in figures(page)
    assert "40: 0.750, wrong label" in page.text and "41: 0.062" in page.text
    assert [image["alt"] for image in page.attributes("img")[:2]] == [
        f"Training image 40, hardest of {CLASSES[1]}",
        f"Training image 41, easiest of {CLASSES[1]}",
    ]
    for picture, image in zip(page.pictures(), images, strict=False):
        np.testing.assert_array_equal(picture, image.transpose(1, 2, 0))
    # Names stay text: two measures, the run that was trained with another radius, a row in each table, what is missing.
    assert page.text.count(HOSTILE) == before + 2 + 1 + 2 + 1
    assert "script" not in [tag for tag, _ in page.elements]
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    first = write_report([run], run.parent / "first.html").read_bytes()
    assert write_report([run], run.parent / "second.html").read_bytes() == first


@pytest.mark.parametrize(
    "tensors", [{}, {"images": np.zeros((2, 3, 5, 6))}, {"images": np.zeros((1, 3, 5, 6), np.uint8)}]
)
def test_pictures_that_do_not_match_a_study_are_refused(run: Path, tensors: dict[str, np.ndarray]) -> None:
    add_study(run, np.zeros((2, 3, 5, 6), np.uint8))
    save_file(tensors, run / "difficulty.safetensors")
    with pytest.raises(UserError, match=r"difficulty.safetensors must hold images, uint8 \(2, 1 or 3, h, w\)"):
        report(run)
