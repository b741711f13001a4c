"""A report's pictures: curves as inline SVG that takes the page's text colour, images as PNG data URIs."""

import base64
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from redan.analysis.results import Growth
from redan.evaluation.results import Accuracy, ConvergencePoint, CurvePoint

# Okabe & Ito (2008): told apart by colour-blind readers, and visible on white and on near-black alike.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼"}

# Stands for the page's text colour, which only the browser knows.
_INK = "#010203"


def line_style(position: int) -> tuple[str, str]:
    """Colour and marker (a key of MARKERS) of the line at ``position``; they repeat after thirty lines."""
    return COLOURS[position % len(COLOURS)], list(MARKERS)[position % len(MARKERS)]


_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.alpha": 0.15,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color"), _INK
    ),
}


def _svg(alt: str, draw: Callable[[Axes], None]) -> Markup:
    """A figure with one pair of axes as an SVG element; the same drawing gives the same bytes."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a user's own matplotlibrc must not change the report
        # Salted by its text, a figure's ids are its own: on one page with others it borrows nobody's clip path.
        matplotlib.rcParams.update(_STYLE | {"svg.hashsalt": ascii(alt)})
        figure = Figure(figsize=(4.2, 2.8), layout="constrained")
        draw(figure.subplots())
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True)
    drawing = re.sub(r"<metadata>.*</metadata>", "", file.getvalue(), flags=re.DOTALL)  # holds the time of drawing
    drawing = re.sub(r'<g id="[\w.]+"', "<g", drawing)  # names such as axes_1, which every figure would repeat
    body = drawing.partition("<svg")[2].replace(_INK, "currentColor")
    return Markup(f'<svg role="img" aria-label="{escape(alt)}"{body}')


def radius_figure(alt: str, norm: str, lines: Sequence[tuple[Sequence[CurvePoint], Sequence[CurvePoint]]]) -> Markup:
    """Accuracy against the threat's radius, each point with its interval; linf radii in units of 1/255.

    A line is a bracket: what stands under attack, and dashed what is certified, with what neither settled between the
    two; either may be empty.
    """

    def draw(axes: Axes) -> None:
        for position, (standing, certified) in enumerate(lines):
            colour, marker = line_style(position)
            for points, style in ((standing, "-"), (certified, "--")):
                radii, values = _percent(norm, points)
                axes.plot(radii, values, style, color=colour, marker=marker)
                low = [100 * point.accuracy.low for point in points]
                high = [100 * point.accuracy.high for point in points]
                axes.vlines(radii, low, high, color=colour, linewidth=1)
            if standing and certified:
                radii, above = _percent(norm, standing)
                ends = _percent(norm, certified)
                inside = [k for k, radius in enumerate(radii) if radius <= ends[0][-1]]
                radii, above = [radii[k] for k in inside], [above[k] for k in inside]
                axes.fill_between(radii, np.interp(radii, *ends), above, color=colour, alpha=0.12, linewidth=0)
        _radius_axis(axes, norm)
        axes.set(ylabel="accuracy, %", ylim=(-2, 102))

    return _svg(alt, draw)


def _percent(norm: str, points: Sequence[CurvePoint]) -> tuple[list[float], list[float]]:
    return [_unit(norm) * point.radius for point in points], [100 * point.accuracy.value for point in points]


def convergence_figure(alt: str, xlabel: str, points: Sequence[tuple[int, ConvergencePoint]]) -> Markup:
    """Accuracy against what an attack spends, on a logarithmic axis, each point with its interval."""

    def draw(axes: Axes) -> None:
        colour, marker = line_style(0)
        spent = [x for x, _ in points]
        axes.plot(spent, [100 * point.accuracy.value for _, point in points], color=colour, marker=marker)
        low, high = ([100 * getattr(point.accuracy, end) for _, point in points] for end in ("low", "high"))
        axes.vlines(spent, low, high, color=colour, linewidth=1)
        axes.set_xscale("log")
        axes.set_xticks(spent, [str(x) for x in spent])
        axes.minorticks_off()
        axes.set(xlabel=xlabel, ylabel="accuracy, %", ylim=(-2, 102))

    return _svg(alt, draw)


def growth_figure(alt: str, norm: str, growth: Growth) -> Markup:
    """Difficulty of the hardest and the easiest decile and of all against the radius, as in ``radius_figure``."""

    def draw(axes: Axes) -> None:
        radii = [_unit(norm) * point.radius for point in growth.points]
        groups = {"hardest": "hardest tenth", "mean": "all", "easiest": "easiest tenth"}
        for position, (name, label) in enumerate(groups.items()):
            colour, marker = line_style(position)
            values = [getattr(point, name) for point in growth.points]
            axes.plot(radii, values, color=colour, marker=marker, label=label)
        _radius_axis(axes, norm)
        axes.set(ylabel="difficulty", ylim=(-0.02, 1.02))
        axes.legend()

    return _svg(alt, draw)


def trials_figure(alt: str, xlabel: str, trials: Sequence[tuple[float, Accuracy, bool]]) -> Markup:
    """What trials came to, each with its interval, against a number of theirs; hollow where they were not completed.

    The axis is logarithmic where the numbers span more than a factor of 20.
    """

    def draw(axes: Axes) -> None:
        colour, marker = line_style(0)
        for x, value, complete in trials:
            axes.plot([x], [100 * value.value], marker, color=colour, fillstyle="full" if complete else "none")
            axes.vlines([x], 100 * value.low, 100 * value.high, color=colour, linewidth=1, alpha=0.4)
        numbers = [x for x, *_ in trials]
        if min(numbers) > 0 and max(numbers) > 20 * min(numbers):
            axes.set_xscale("log")
        elif all(isinstance(x, int) for x in numbers):
            axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        axes.set(xlabel=xlabel, ylabel="validation accuracy, %", ylim=(-2, 102))

    return _svg(alt, draw)


def _unit(norm: str) -> int:
    return 255 if norm == "linf" else 1


def _radius_axis(axes: Axes, norm: str) -> None:
    if _unit(norm) == 255:
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 4, 8, 10]))
    axes.set(xlabel="radius, in 1/255" if _unit(norm) == 255 else "radius")


def training_figures(name: str, metrics: Sequence[Mapping[str, Any]]) -> list[Markup]:
    """Loss, accuracies, what a method and a monitor say, by epoch, a figure each; what was never measured is left out.

    Training and validation share their axes: the gap between them is how robust overfitting shows (Rice et al. 2020).
    A dotted line marks the start of a new phase.
    """
    starts = [now for now in range(1, len(metrics)) if metrics[now].get("phase") != metrics[now - 1].get("phase")]
    figures = []
    for title, scale, columns in (
        ("Loss", 1, {"training": "loss"}),
        (
            "Clean accuracy, %",
            100,
            {
                "training": "clean_accuracy",
                "validation": "validation_clean_accuracy",
                "training, clean branch": "clean_branch_accuracy",
            },
        ),
        ("Robust accuracy, %", 100, {"training": "robust_accuracy", "validation": "validation_robust_accuracy"}),
        ("Cosine of clean and adversarial features", 1, {"training": "invariance"}),
        ("Weight of the adversarial cross-entropy, alpha", 1, {"training": "alpha"}),
        ("Weights in gradient conflict, %", 100, {"classification against invariance": "conflict_share"}),
        ("Cosine of the two gradients", 1, {"classification and invariance": "conflict_cosine"}),
        (
            "Variance of BatchNorm's running means",
            1,
            {branch: f"bn_variance_{branch}" for branch in ("adversarial", "clean", "shared")},
        ),
    ):
        series = {label: scale * _column(metrics, key) for label, key in columns.items()}
        measured = {label: values for label, values in series.items() if np.isfinite(values).any()}
        if measured:
            ends = (f"{label} {values[np.isfinite(values)][-1]:.4g}" for label, values in measured.items())
            alt = f"{name} over {len(metrics)} epochs. {title}, at the end: {', '.join(ends)}"
            figures.append(_svg(alt, partial(_draw_training, title, measured, starts)))
    return figures


def _draw_training(
    title: str, series: Mapping[str, npt.NDArray[np.float64]], starts: Sequence[int], axes: Axes
) -> None:
    for position, (label, values) in enumerate(series.items()):
        colour, marker = line_style(position)
        (shown,) = np.nonzero(np.isfinite(values))  # validation may skip epochs: its line joins those that it has
        axes.plot(1 + shown, values[shown], color=colour, marker=marker, markersize=3, label=label)
    for start in starts:
        axes.axvline(start + 0.5, color=_INK, linestyle=":", linewidth=1)
    axes.set(title=title, xlabel="epoch")
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    if len(series) > 1:
        axes.legend()


def _column(metrics: Sequence[Mapping[str, Any]], key: str) -> npt.NDArray[np.float64]:
    """One number an epoch, ``nan`` where the epoch has none."""
    values = (epoch.get(key) for epoch in metrics)
    return np.array([value if isinstance(value, int | float) else math.nan for value in values], dtype=np.float64)


def magnified(image: npt.NDArray[Any], adversarial: npt.NDArray[Any]) -> tuple[npt.NDArray[np.float64], float]:
    """The difference of two images as a picture: grey where they agree, black or white where they differ most.

    Args:
        image: ``(c, h, w)`` in [0, 1].
        adversarial: likewise.

    Returns:
        The picture, ``(c, h, w)`` in [0, 1], and its magnification: how many times larger the picture's distance from
        mid-grey is than the difference (1 where the images are equal).
    """
    difference = adversarial.astype(np.float64) - image.astype(np.float64)
    peak = float(np.abs(difference).max())
    magnification = 1 / (2 * peak) if peak > 0 else 1.0
    return 0.5 + magnification * difference, magnification


def png(image: npt.NDArray[Any]) -> str:
    """A data URI of ``image``, ``(1 or 3, h, w)`` in [0, 1], rounded to the nearest of 256 levels."""
    levels = np.rint(255 * np.clip(image, 0, 1)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(levels[0] if len(levels) == 1 else levels.transpose(1, 2, 0)).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
