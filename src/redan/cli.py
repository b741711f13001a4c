"""The commands: thin, over the same functions that Python users call."""

import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec, TypeVar, cast

import typer
import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from redan.errors import Stopped, UserError
from redan.version import __version__

if TYPE_CHECKING:
    from redan.attacks.search import Precision

P = ParamSpec("P")
R = TypeVar("R")


class _Commands(TyperGroup):
    """Commands with names of two words, such as ``data prune``, beside those of one, such as ``data``."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name = " ".join(args[:2])
        return super().resolve_command(ctx, [name, *args[2:]] if name in self.commands else args)


app = typer.Typer(
    name="redan",
    cls=_Commands,
    help="Train image classifiers to withstand adversarial examples, attack them, and report what can be trusted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
console = Console(highlight=False)

DataDir = Annotated[
    Path | None, typer.Option("--data-dir", envvar="REDAN_DATA", help="Folder of data sets; else the user's cache.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output and nothing else.")]
Overrides = Annotated[
    list[str] | None, typer.Option("-o", "--override", metavar="KEY=VALUE", help="Change a key of the recipe.")
]
Samples = Annotated[int | None, typer.Option("--samples", help="The first N test images; all if not given.")]
AttackSeed = Annotated[int, typer.Option("--seed", help="Seed of the attacks.")]
Which = Annotated[str, typer.Option("--checkpoint", help="Of a run: best or last.")]
Data = Annotated[str | None, typer.Option("--data", help="Data set; the run's own if not given.")]
InputMean = Annotated[str | None, typer.Option("--input-mean", help="For a network without its normalisation.")]
InputStd = Annotated[str | None, typer.Option("--input-std", help="Likewise: comma-separated, one a channel.")]


def _mannerly(command: Callable[P, R]) -> Callable[P, R]:
    """A user's mistake ends in one line and exit code 2, a stop by the user in one line and 130; no traceback."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except UserError as error:
            _say(f"redan: {error}")
            raise typer.Exit(2) from error
        except Stopped as stop:
            _say(f"redan: {stop}")
            raise typer.Exit(130) from stop
        except KeyboardInterrupt as stop:
            _say("redan: stopped")
            raise typer.Exit(130) from stop

    return run


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    warnings.formatwarning = lambda message, *_: f"redan: {message}\n"


@app.command()
@_mannerly
def demo(
    out: Annotated[Path, typer.Option("--out", help="New folder for the runs and the report.")] = Path("redan-demo"),
    as_json: Json = False,
) -> None:
    """Train seven methods on digits, attack, certify and report: under three minutes, no network."""
    from redan.demonstration import demo as run_demo

    results, report = run_demo(out)
    if as_json:
        document = {"report": str(report), "evaluations": [json.loads(result.model_dump_json()) for result in results]}
        print(json.dumps(document))
        return
    _print_results(results)
    console.print(f"Report: {report}", soft_wrap=True)


@app.command()
@_mannerly
def train(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe (see redan recipes), a YAML file or a run folder.")],
    override: Overrides = None,
    out: Annotated[Path | None, typer.Option("--out", help="Run folder; runs/NAME if not given.")] = None,
    data_dir: DataDir = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what the run folder holds.")] = False,
    devices: Annotated[
        int, typer.Option("--devices", min=1, help="GPUs (or CPU processes) that share each batch.")
    ] = 1,
    as_json: Json = False,
) -> None:
    """Train what a recipe describes."""
    from redan.recipes.schema import parse_overrides
    from redan.training.trainer import train as run_train

    run = run_train(
        recipe, out, overrides=parse_overrides(override or []), data_dir=data_dir, resume=resume, devices=devices
    )
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return  # one of several processes speaks
    if as_json:
        print(json.dumps({"run": str(run), "epochs": _records(run)}))
    else:
        console.print(f"Trained: {run}. Next: redan evaluate {run}", soft_wrap=True)


@app.command()
@_mannerly
def evaluate(
    run: Annotated[str, typer.Argument(help="A run folder, or package.module:function that returns an nn.Module.")],
    threat: Annotated[
        list[str] | None,
        typer.Option(
            "--threat",
            help="Such as linf:8/255, l2:0.5, stadv:0.05 or rotation:30+3; again for more. The run's own if not given, "
            "for purification several.",
        ),
    ] = None,
    attack: Annotated[
        str | None,
        typer.Option(
            "--attack",
            help="autoattack, purification[-STEPS], or attacks in order, such as pgd-50+apgd-t; pgd-20:cw+apgd if not "
            "given.",
        ),
    ] = None,
    samples: Samples = None,
    seed: AttackSeed = 0,
    checkpoint: Which = "best",
    curve: Annotated[bool, typer.Option("--curve/--no-curve", help="Find the accuracy at other radii, too.")] = True,
    data: Data = None,
    data_dir: DataDir = None,
    input_mean: InputMean = None,
    input_std: InputStd = None,
    precision: Annotated[
        str, typer.Option("--precision", help="Of the search: auto, float32 or bfloat16. Float32 confirms.")
    ] = "auto",
    draws: Annotated[
        int, typer.Option("--draws", help="Passes behind each gradient and verdict on a model that draws at random.")
    ] = 20,
    diagnose: Annotated[
        bool, typer.Option("--diagnose", help="Look for gradient masking, which makes attacks fail.")
    ] = False,
    transfer: Annotated[
        str | None,
        typer.Option("--transfer", metavar="RUN", help="With --diagnose: attack by way of another run, too."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the results; RUN/results if not given.")] = None,
    save_images: Annotated[
        bool, typer.Option("--save-images", help="Keep the adversarial images, exact and as 8-bit pixels.")
    ] = False,
    certify: Annotated[
        bool, typer.Option("--certify", help="Prove what can be proved, too, see redan certify.")
    ] = False,
    timeout: Annotated[
        float, typer.Option("--timeout", help="With --certify: seconds for each image that bounds leave open.")
    ] = 60.0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an evaluation that was stopped.")] = False,
    fail_under: Annotated[
        float | None, typer.Option("--fail-under", help="Exit with 1 if the robust accuracy is below, in [0, 1].")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure accuracy, clean and under attack, on test images."""
    from redan.evaluation.several import evaluate_within

    results = evaluate_within(
        run,
        threat or [],
        attack=attack,
        samples=samples,
        seed=seed,
        checkpoint=_checkpoint(checkpoint),
        curve=curve,
        data=data,
        data_dir=data_dir,
        input_mean=_numbers(input_mean),
        input_std=_numbers(input_std),
        precision=cast("Precision", precision),  # an unknown one is refused where it is used
        draws=draws,
        diagnose=diagnose,
        transfer=transfer,
        out=out,
        save_images=save_images,
        certify=certify,
        timeout=timeout,
        resume=resume,
    )
    if as_json:
        documents = [result.model_dump_json() for result in results]
        print(documents[0] if len(documents) == 1 else f"[{','.join(documents)}]")
    else:
        _print_results(results)
        for result in results:
            if result.diagnostics:
                verdicts = {True: "pass", False: "FAIL", None: "-"}
                rows = [[verdicts[check.passed], check.name, check.figure] for check in result.diagnostics]
                _print_table(("", "check", f"what was found within {result.threat}"), rows)
    failed = sum(check.passed is False for result in results for check in result.diagnostics)
    if failed:
        _say(f"redan: {failed} check{'s' * (failed > 1)} failed: this robust accuracy is not to be trusted")
    least = min(result.robust_accuracy for result in results)
    if fail_under is not None and least < fail_under:
        _say(f"redan: robust accuracy {least:.4f} is below {fail_under}")
        raise typer.Exit(1)


@app.command()
@_mannerly
def certify(
    run: Annotated[
        str,
        typer.Argument(
            help="A run folder, an ONNX file, package.module:function that returns an nn.Module, or VNN-COMP's "
            "instances.csv."
        ),
    ],
    threat: Annotated[
        str | None, typer.Option("--threat", help="Such as linf:8/255 or l2:0.5; the run's own if not given.")
    ] = None,
    samples: Samples = None,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            help="cascade, colt or colt-8 (as published for 2/255 and 8/255), or one part: interval, zonotope, "
            "learned-zonotope, crown-ibp, crown, alpha-crown, input-split, branch-and-bound, milp.",
        ),
    ] = "cascade",
    timeout: Annotated[float, typer.Option("--timeout", help="Seconds for each image that bounds leave open.")] = 60.0,
    sound_float: Annotated[
        str,
        typer.Option(
            "--sound-float",
            help="Rounding that a certificate covers: exact (redan's own), network (the network's, too) or off.",
        ),
    ] = "exact",
    solver: Annotated[
        str,
        typer.Option(
            "--solver", help="Of mixed-integer programs: scip, highs, gurobi (your licence); auto: the first."
        ),
    ] = "auto",
    shard: Annotated[str, typer.Option("--shard", help="i/n: only the i-th of n parts; report joins them.")] = "1/1",
    seed: AttackSeed = 0,
    checkpoint: Which = "best",
    curve: Annotated[
        bool, typer.Option("--curve/--no-curve", help="Find what can be proved at smaller radii, too.")
    ] = True,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Images that are bounded together.")] = 100,
    data: Data = None,
    data_dir: DataDir = None,
    input_mean: InputMean = None,
    input_std: InputStd = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder of the result; RUN/certificates if not given.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a certification that was stopped.")] = False,
    fail_under: Annotated[
        float | None, typer.Option("--fail-under", help="Exit with 1 if the certified accuracy is below, in [0, 1].")
    ] = None,
    vnnlib: Annotated[
        Path | None, typer.Option("--vnnlib", metavar="FILE", help="Decide this property of an ONNX file instead.")
    ] = None,
    counterexample: Annotated[
        Path | None, typer.Option("--counterexample", metavar="FILE", help="With --vnnlib: write what violates it.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Prove what can be proved of test images: that nothing within the threat changes their label."""
    options: dict[str, Any] = {"method": method, "sound_float": sound_float, "solver": solver}
    options |= {"input_mean": _numbers(input_mean), "input_std": _numbers(input_std)}
    if vnnlib is not None or run.endswith(".csv"):
        given = (threat, samples, fail_under, data, shard, seed, checkpoint, curve, batch_size)
        if given != (None, None, None, None, "1/1", 0, "best", True, 100):
            raise UserError("properties name their own inputs: leave out what is about test images")
    if run.endswith(".csv"):
        if (vnnlib, counterexample, timeout) != (None, None, 60.0):
            raise UserError(
                "instances.csv names properties and seconds, --out a folder for results: leave the rest out"
            )
        _decide_all(run, options, out, resume, as_json)
        return
    if vnnlib is not None:
        if out is not None or resume:
            raise UserError("--vnnlib gives one verdict and keeps nothing: leave --out and --resume out")
        _decide(run, vnnlib, options, timeout, counterexample, as_json)
        return
    if counterexample is not None:
        raise UserError("--counterexample goes with --vnnlib; counterexamples of images are kept beside the result")
    from redan.evaluation.certify import certify as run_certification

    result = run_certification(
        run,
        threat=threat,
        samples=samples,
        timeout=timeout,
        shard=shard,
        seed=seed,
        checkpoint=_checkpoint(checkpoint),
        curve=curve,
        batch_size=batch_size,
        data=data,
        data_dir=data_dir,
        out=out,
        resume=resume,
        **options,
    )
    print(result.model_dump_json()) if as_json else _print_certificates(result)
    if fail_under is not None and result.certified_accuracy < fail_under:
        _say(f"redan: certified accuracy {result.certified_accuracy:.4f} is below {fail_under}")
        raise typer.Exit(1)


@app.command()
@_mannerly
def export(
    run: Annotated[str, typer.Argument(help="As redan certify takes it.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the files.")],
    threat: Annotated[
        str | None, typer.Option("--threat", help="Such as linf:8/255; the run's own if not given.")
    ] = None,
    samples: Annotated[int, typer.Option("--samples", help="Properties of the first N test images.")] = 0,
    timeout: Annotated[float, typer.Option("--timeout", help="Seconds that instances.csv allows each.")] = 300.0,
    checkpoint: Which = "best",
    data: Data = None,
    data_dir: DataDir = None,
    input_mean: InputMean = None,
    input_std: InputStd = None,
    as_json: Json = False,
) -> None:
    """Write a network as ONNX, and its robustness as VNN-LIB, for other verifiers and runtimes."""
    from redan.evaluation.properties import export as run_export

    path = run_export(
        run,
        out,
        threat=threat,
        samples=samples,
        timeout=timeout,
        checkpoint=_checkpoint(checkpoint),
        data=data,
        data_dir=data_dir,
        input_mean=_numbers(input_mean),
        input_std=_numbers(input_std),
    )
    print(json.dumps({"network": str(path)})) if as_json else console.print(f"Network: {path}", soft_wrap=True)


@app.command()
@_mannerly
def analyse(
    run: Annotated[Path, typer.Argument(help="A run folder, with its checkpoint.")],
    difficulty: Annotated[
        bool,
        typer.Option(
            "--difficulty",
            help="Study which training images are hard, instead of the networks: print how difficulty, 1 - p of the "
            "label, grows over 0, 1/4, 1/2 and all of the threat's radius (see --radii) for the easiest and the "
            "hardest tenth, how its definitions and runs correlate, and how each tenth is fitted when the learning "
            "rate drops. Writes RUN/difficulty.json and .safetensors, with the hardest and easiest images of the "
            "first 10 classes for redan report.",
        ),
    ] = False,
    against: Annotated[
        list[Path] | None,
        typer.Option("--against", metavar="RUN", help="With --difficulty: compare with this run, too; again for more."),
    ] = None,
    radii: Annotated[
        str | None,
        typer.Option("--radii", help="With --difficulty: at these, comma-separated, such as 0,2/255,4/255,8/255."),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            "--samples",
            help="How many images, the first N: of the test set; with --difficulty, of the training images. All if not "
            "given.",
        ),
    ] = None,
    batches: Annotated[
        int | None,
        typer.Option("--batches", help="Training batches whose gradients are compared; 20 if not given."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the batches and attacks.")] = 0,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Look inside a run: gradient conflict, invariance of features, branches of BatchNorm; or its hard examples."""
    if difficulty:
        if batches is not None:
            raise UserError("--batches is of gradients, which --difficulty does not look at: leave one of them out")
        _study_difficulty(run, against or [], _numbers(radii), samples, seed, data_dir, as_json)
        return
    if against:
        raise UserError("--against goes with --difficulty: it compares which training images runs find hard")
    if radii is not None:
        raise UserError("--radii goes with --difficulty: it says how far the attack on training images may go")
    from redan.analysis.analyse import analyse as run_analysis

    batches = 20 if batches is None else batches
    result = run_analysis(run, samples=samples, batches=batches, seed=seed, data_dir=data_dir)
    if as_json:
        print(result.model_dump_json())
        return
    branches = [[name, str(it.clean), str(it.robust), str(it.cosine)] for name, it in result.branches.items()]
    _print_table(("BatchNorm", "clean [95 %]", f"{result.attack} [95 %]", "feature cosine"), branches)
    if result.conflicts:
        rows = [
            [name, f"{100 * it.share.mean:.2f} ± {100 * it.share.deviation:.2f} %", str(it.cosine)]
            for name, it in result.conflicts.items()
        ]
        _print_table(("gradient of invariance", "weights in conflict", "cosine with classification"), rows)
    else:
        console.print(f"the loss of {result.method} is not in two parts here: no conflict is measured")
    if result.norm_gaps:
        gaps = [[gap.layer, f"{gap.mean:.3f}", f"{gap.scale:.3f}"] for gap in result.norm_gaps]
        _print_table(("BatchNorm", "|mean gap| / sigma", "|log sigma ratio|"), gaps)
    console.print(f"Kept: {run / 'analysis.json'}", soft_wrap=True, markup=False)


def _study_difficulty(
    run: Path,
    against: list[Path],
    radii: list[float] | None,
    samples: int | None,
    seed: int,
    data_dir: Path | None,
    as_json: bool,
) -> None:
    from redan.analysis.hard_examples import study_difficulty

    result = study_difficulty(run, against=against, radii=radii, samples=samples, seed=seed, data_dir=data_dir)
    if as_json:
        print(result.model_dump_json())
        return
    for title, growth in (("attack's radius", result.growth), ("trained within", result.training_growth)):
        if growth is not None:
            rows = [
                [point.run, f"{point.radius:.4g}", *(f"{it:.4f}" for it in (point.easiest, point.hardest, point.mean))]
                for point in growth.points
            ]
            console.print(f"{growth.measure}, of {growth.examples} training images:", soft_wrap=True)
            _print_table(("run", title, "easiest decile", "hardest decile", "all"), rows)
            losses = [
                [point.run, f"{point.radius:.4g}", f"{point.easiest_loss:.4f}", f"{point.hardest_loss:.4f}"]
                for point in growth.points
                if point.hardest_loss is not None
            ]
            if losses:
                _print_table(("run", title, "easiest, loss", "hardest, loss"), losses)
    names, known = result.correlations.names, result.correlations.examples
    rows = [[f"{i} {name}", str(known[i - 1][i - 1])] for i, name in enumerate(names, 1)]
    _print_table(("measure of difficulty", "images"), rows)
    _print_pairs("Spearman correlation", result.correlations.spearman, "{:.3f}")
    if len({number for row in known for number in row}) > 1:
        _print_pairs("images that both know", known, "{}")
    if result.memorisation is not None:
        found = result.memorisation
        rows = [[it.group, str(it.examples), *map(_percent, (it.before, it.after, it.jump))] for it in found.groups]
        _print_table(("training accuracy", "images", f"epoch {found.before}", f"epoch {found.after}", "jump"), rows)
    for line in result.missing:
        console.print(line, soft_wrap=True, markup=False)
    console.print(f"Kept: {run / 'difficulty.json'}", soft_wrap=True, markup=False)


def _print_pairs(title: str, table: Sequence[Sequence[float | None]], form: str) -> None:
    """A number for each with each, by their own numbers; ``form`` is its format."""
    rows = [
        [str(i), *("-" if value is None else form.format(value) for value in row)] for i, row in enumerate(table, 1)
    ]
    _print_table((title, *(str(i) for i in range(1, len(table) + 1))), rows)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f} %"


@app.command()
@_mannerly
def sweep(
    recipes: Annotated[list[str], typer.Argument(metavar="RECIPE", help="Recipes, as redan train takes them.")],
    override: Overrides = None,
    grid: Annotated[
        list[str] | None,
        typer.Option("--grid", metavar="KEY=V1,V2", help="Values to try; each with each of the others."),
    ] = None,
    seeds: Annotated[
        str | None, typer.Option("--seeds", help="Of the training, such as 0,1,2; each makes a run; 0 if not given.")
    ] = None,
    attack: Annotated[str | None, typer.Option("--attack", help="As redan evaluate takes it.")] = None,
    samples: Samples = None,
    checkpoint: Annotated[
        str | None, typer.Option("--checkpoint", help="Of each run: best or last; best if not given.")
    ] = None,
    analyse: Annotated[bool, typer.Option("--analyse", help="Look inside each run, too, see redan analyse.")] = False,
    space: Annotated[
        str | None,
        typer.Option(
            "--space", metavar="FILE", help="Search: values to draw for keys of one recipe, or a shipped name (colt)."
        ),
    ] = None,
    trials: Annotated[int | None, typer.Option("--trials", help="Of a search: how many are to be finished.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of what a search draws; 0 if not given.")] = None,
    storage: Annotated[
        str | None, typer.Option("--storage", metavar="URL", help="Of a search: a database, for several machines.")
    ] = None,
    pruning: Annotated[
        bool, typer.Option("--pruning/--no-pruning", help="Of a search: end trials whose accuracy falls behind.")
    ] = True,
    certify: Annotated[
        str | None,
        typer.Option(
            "--certify", metavar="METHOD", help="Of a search: judge by what this certifies at the end, prune none."
        ),
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder of the runs and the table.")] = Path("runs/sweep"),
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Train and attack many runs, over recipes, options and seeds, or search for values; the same command goes on."""
    from redan.recipes.schema import parse_overrides

    if space is not None:
        others = {"--grid": grid, "--attack": attack, "--samples": samples, "--analyse": analyse or None}
        others |= {"--seeds": seeds, "--checkpoint": checkpoint}
        if given := [option for option, value in others.items() if value is not None]:
            raise UserError(f"a search looks at held-out images alone; leave {given[0]} out, or --space")
        if len(recipes) > 1 or trials is None:
            raise UserError("a search takes one recipe, --space and --trials, such as --trials 30")
        overrides = parse_overrides(override or [])
        _search(recipes[0], space, trials, overrides, seed or 0, pruning, certify, storage, out, data_dir, as_json)
        return
    ours: dict[str, Any] = {"--trials": trials, "--seed": seed, "--storage": storage, "--certify": certify}
    ours["--no-pruning"] = None if pruning else True
    if given := [option for option, value in ours.items() if value is not None]:
        raise UserError(f"{given[0]} is of a search; name its --space, too")

    from redan.sweeping.grid import parse_grid, summary
    from redan.sweeping.grid import sweep as run_sweep

    rows = run_sweep(
        recipes,
        overrides=parse_overrides(override or []),
        grid=parse_grid(grid or []),
        seeds=_seeds(seeds or "0"),
        attack=attack,
        samples=samples,
        checkpoint=_checkpoint(checkpoint or "best"),
        analyse=analyse,
        out=out,
        data_dir=data_dir,
    )
    if as_json:
        print(json.dumps({"table": str(out / "sweep.md"), "rows": [row.model_dump(mode="json") for row in rows]}))
    else:
        header, lines = summary(rows)
        _print_table(header, lines)
        console.print(f"Table: {out / 'sweep.md'}", soft_wrap=True, markup=False)
    failed = [row for row in rows if row.error is not None]
    if failed:
        _say(f"redan: {len(failed)} of {len(rows)} rows failed; the same command tries them again")
        raise typer.Exit(1)


def _search(
    recipe: str,
    space: str,
    trials: int,
    overrides: dict[str, Any],
    seed: int,
    pruning: bool,
    certify: str | None,
    storage: str | None,
    out: Path,
    data_dir: Path | None,
    as_json: bool,
) -> None:
    """``redan sweep RECIPE --space FILE --trials N``."""
    from redan.sweeping.search import search, summary

    found = search(
        recipe,
        space=space,
        trials=trials,
        overrides=overrides,
        seed=seed,
        pruning=pruning,
        certify=certify,
        storage=storage,
        out=out,
        data_dir=data_dir,
    )
    best = None if found.best is None else str(out / "best.yaml")
    if as_json:
        rows = [trial.model_dump(mode="json") for trial in found.trials]
        print(json.dumps({"table": str(out / "sweep.md"), "best": best, "trials": rows}))
    else:
        _print_table(*summary(found))
        console.print(f"Table: {out / 'sweep.md'}", soft_wrap=True, markup=False)
        if best is not None:
            console.print(f"Best recipe: {best}. Next: redan train {best}", soft_wrap=True, markup=False)
    if (missing := trials - found.finished) > 0:
        _say(f"redan: {missing} of {trials} trials failed; the same command draws others")
        raise typer.Exit(1)


@app.command()
@_mannerly
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Run folders.")],
    out: Annotated[Path, typer.Option("--out", help="The page to write.")] = Path("report.html"),
    as_json: Json = False,
) -> None:
    """Write one self-contained HTML page about runs."""
    from redan.reporting import write_report

    path = write_report(runs, out)
    print(json.dumps({"report": str(path)})) if as_json else console.print(f"Report: {path}", soft_wrap=True)


@app.command()
@_mannerly
def recipes(
    name: Annotated[str | None, typer.Argument(help="Show this recipe, resolved; list all if not given.")] = None,
    override: Overrides = None,
    as_json: Json = False,
) -> None:
    """List the shipped recipes, or show one with every key it resolves to."""
    from redan.recipes.schema import load_recipe, parse_overrides, shipped_recipes

    if name is not None:
        content = load_recipe(name, parse_overrides(override or [])).resolved()
        print(
            json.dumps(content) if as_json else yaml.safe_dump(content, sort_keys=False, allow_unicode=True),
            end="\n" if as_json else "",
        )
        return
    descriptions = {known: load_recipe(known).description for known in shipped_recipes()}
    if as_json:
        print(json.dumps(descriptions))
        return
    _print_table(("recipe", "what it does"), [[known, text] for known, text in descriptions.items()])


@app.command()
@_mannerly
def data(
    name: Annotated[str | None, typer.Argument(help="Load this data set, downloading it if need be.")] = None,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """List the data sets and where they are, or fetch and check one; redan data prune chooses images."""
    from redan.data.registry import DATASETS, load_dataset, locate

    if name is not None:
        loaded = load_dataset(name, data_dir)
        facts = {
            "name": name,
            "training_images": len(loaded.train),
            "test_images": len(loaded.test),
            "shape": list(loaded.train.images.shape[1:]),
            "classes": list(loaded.class_names),
        }
        if as_json:
            print(json.dumps(facts))
        else:
            _print_table(("", name), [[key.replace("_", " "), _listed(value)] for key, value in facts.items()][1:])
        return
    places = {known: locate(known, data_dir) for known in DATASETS}
    if as_json:
        print(json.dumps({known: str(place) if place else None for known, place in places.items()}))
        return
    rows = [
        [known, info.description, str(places[known] or "not here; fetched when needed")]
        for known, info in DATASETS.items()
    ]
    _print_table(("data set", "what it is", "where"), rows)
    console.print("Any folder of images, one sub-folder a class: folder:PATH or folder:PATH@SIZE")


@app.command("data prune")
@_mannerly
def prune(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN", help="Runs with a dpls block (scale: 0 will do), whose difficulties are averaged."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="The index file to write, for data.indices of a recipe.")],
    keep: Annotated[str | None, typer.Option("--keep", help="Which images: hard, easy or random.")] = None,
    count: Annotated[int | None, typer.Option("--count", help="With --keep: how many.")] = None,
    plus: Annotated[
        str | None, typer.Option("--plus", metavar="random:N", help="With --keep: N random ones of the rest, too.")
    ] = None,
    drop_hardest: Annotated[
        float | None, typer.Option("--drop-hardest", metavar="SHARE", help="All but this share; in place of --keep.")
    ] = None,
    balanced: Annotated[
        bool, typer.Option("--balanced/--global", help="As many of each class, or whatever their classes.")
    ] = True,
    seed: Annotated[int, typer.Option("--seed", help="Of random choices.")] = 0,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Choose training images by how hard runs found them, and write an index file.

    The 10,000 hardest, the 10,000 easiest, and 5,000 hard with 5,000 random ones:

    \b
    redan data prune RUN --keep hard --count 10000 --out hard.json
    redan data prune RUN --keep easy --count 10000 --out easy.json
    redan data prune RUN --keep hard --count 5000 --plus random:5000 --out mixed.json
    """  # noqa: D301 (the backslash tells click to leave these lines as they are)
    from redan.pruning import prune as run_prune

    path = run_prune(
        runs,
        keep=keep,
        count=count,
        plus=plus,
        drop_hardest=drop_hardest,
        balanced=balanced,
        seed=seed,
        out=out,
        data_dir=data_dir,
    )
    content = json.loads(path.read_bytes())
    images, size, name = len(content["indices"]), content["size"], content["dataset"]
    if as_json:
        groups = {group: len(members) for group, members in content["groups"].items()}
        print(json.dumps({"file": str(path), "dataset": name, "images": images, "of": size, "groups": groups}))
        return
    console.print(
        f"Index file: {path}, {images} of {size} training images of {name}. "
        f"Next: redan train RECIPE -o data.indices={path} -o data.train_samples=null",
        soft_wrap=True,
        markup=False,
    )


def _checkpoint(text: str) -> Any:
    if text not in ("best", "last"):
        raise UserError(f"--checkpoint is best or last, got {text!r}")
    return text


def _numbers(text: str | None) -> list[float] | None:
    from redan.threats import parse_number

    return None if text is None else [parse_number(part) for part in text.split(",")]


def _seeds(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"--seeds are whole numbers such as 0,1,2, got {text!r}") from error


def _records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _listed(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _print_results(results: list[Any]) -> None:
    proved = any(result.certified is not None for result in results)
    rows = [
        [
            result.run,
            result.threat,
            str(result.samples),
            str(result.clean),
            str(result.robust),
            *([str(result.certified or "-")] if proved else []),
        ]
        for result in results
    ]
    header = ("run", "threat", "images", "clean [95 %]", "robust [95 %]", *(("certified [95 %]",) if proved else ()))
    _print_table(header, rows)
    for result in results:
        steps = ", ".join(f"{name} {100 * value:.2f} %" for name, value in result.attacks.items())
        told = "by each rule of counting" if result.randomised else f"after each attack: {steps}"
        console.print(f"{result.run} within {result.threat}, {told}", soft_wrap=True, markup=False)
        if result.account:
            console.print(result.account, soft_wrap=True, markup=False)
        if result.randomised is not None:
            _print_randomised(result)
        if result.transferred is not None:
            said = f"transfer alone, as such papers report it: {result.transferred}"
            console.print(said, soft_wrap=True, markup=False)
        _print_convergence(result)
    for mode in dict.fromkeys(it.certified_sound_float for it in results if it.certified_sound_float is not None):
        console.print(f"certificates hold for {COVERED[mode]}", soft_wrap=True, markup=False)


# What a certificate holds for, by the rounding that it covers.
COVERED = {
    "exact": "the network with its float32 weights in exact arithmetic",
    "network": "every order in which a float32 runtime adds up, too",
    "off": "exact arithmetic in redan, too: rounding is not covered",
}


def _print_certificates(result: Any) -> None:
    """The bracket, and which stage settled how many images in which time."""
    part = "" if result.shard == (1, 1) else ", part {} of {}".format(*result.shard)
    row = [
        result.run,
        result.threat,
        f"{result.images}{part}",
        *map(str, (result.clean, result.standing, result.proved)),
    ]
    _print_table(("run", "threat", "images", "clean [95 %]", "standing [95 %]", "certified [95 %]"), [row])
    rows = [
        [verdict, by or "-", str(images), f"{mean:.3f}", f"{most:.2f}"]
        for verdict, by, images, mean, most in result.settled
    ]
    _print_table(("verdict", "by", "images", "seconds each", "at most"), rows)
    console.print(f"certificates hold for {COVERED[result.sound_float]}", soft_wrap=True, markup=False)
    if result.curve:
        points = ", ".join(f"{100 * it.accuracy.value:.2f} % at {it.radius:.4g}" for it in result.curve)
        console.print(f"certified at each radius: {points}", soft_wrap=True, markup=False)


def _decide(
    network: str, vnnlib: Path, options: dict[str, Any], timeout: float, counterexample: Path | None, as_json: bool
) -> None:
    """``redan certify NETWORK.onnx --vnnlib FILE``."""
    from redan.evaluation.properties import decide

    decision = decide(network, vnnlib, timeout=timeout, counterexample=counterexample, **options)
    if as_json:
        print(decision.model_dump_json())
    else:
        by = "" if decision.by is None else f" by {decision.by}"
        console.print(f"{decision.verdict}{by} ({decision.seconds:.2f} s)", soft_wrap=True, markup=False)


def _decide_all(instances: str, options: dict[str, Any], out: Path | None, resume: bool, as_json: bool) -> None:
    """``redan certify instances.csv``."""
    from redan.evaluation.properties import decide_all

    decisions = decide_all(instances, out=out, resume=resume, **options)
    if as_json:
        print(json.dumps({"decisions": [it.model_dump() for it in decisions]}))
        return
    rows = [[it.network, it.property, it.verdict, it.by or "-", f"{it.seconds:.2f}"] for it in decisions]
    _print_table(("network", "property", "verdict", "by", "seconds"), rows)


def _print_randomised(result: Any) -> None:
    """What was counted of a network that draws at random."""
    from redan.evaluation.results import Accuracy

    drawn = result.randomised
    rules = {
        "mean": "mean of the draws",
        "worst": f"right in all {drawn.draws} draws",
        "majority": "right in most draws",
        "fixed": "one draw, known to the attacker",
    }
    counts = [[text, str(getattr(drawn.clean, rule)), str(getattr(drawn.robust, rule))] for rule, text in rules.items()]
    _print_table(("rule of counting", "clean [95 %]", "robust [95 %]"), counts)
    samples = result.samples
    after = [[name, str(Accuracy.of(round(value * samples), samples))] for name, value in drawn.after.items()]
    _print_table(("worst candidates after", "mean of new draws [95 %]"), after)


def _print_convergence(result: Any) -> None:
    """Accuracy against steps and draws, where it was studied."""
    if result.convergence:
        points = [[str(it.steps), str(it.draws), str(it.accuracy)] for it in result.convergence]
        images = result.convergence[0].accuracy.samples
        _print_table(("PGD steps", "EOT draws", f"mean of new draws, first {images} images [95 %]"), points)


def _print_table(header: tuple[str, ...], rows: list[list[str]]) -> None:
    table = Table(*header, box=None, pad_edge=False, collapse_padding=True, padding=(0, 1, 0, 0), header_style="bold")
    for row in rows:
        table.add_row(*map(escape, row))  # a run's name may hold brackets, which are no markup
    for column in table.columns:
        column.overflow = "fold"  # a cut name cannot be typed again
    console.print(table)
