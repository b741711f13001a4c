"""The recipe: everything that a run needs, in one validated file."""

import copy
import difflib
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from redan.attacks.pgd import Start
from redan.attacks.search import Mode, Precision
from redan.errors import UserError, unknown
from redan.files import write_atomically
from redan.methods.atop import AToPConfig
from redan.methods.base import Config, Number, OptimizerConfig, ScheduleConfig, number
from redan.methods.dpls import DPLSConfig
from redan.methods.registry import check_dpls, check_purification, check_teacher, method_options, parse_options
from redan.methods.weight_averaging import WeightAveragingConfig
from redan.methods.weight_perturbation import WeightPerturbationConfig
from redan.models.purifiers.registry import purifier_options
from redan.models.random_transforms import transform_options
from redan.models.registry import model_options
from redan.threats import LpBall, parse_threat


class DataConfig(Config):
    """Which images: ``train_samples`` takes a class-balanced choice, ``validation_samples`` are held out before it.

    ``indices`` is an index file, see ``redan data prune``: training is on its images, as far as they are not held out.
    ``wrong_labels`` is the share of the training images, in each class, that get a wrong label, for studies of
    memorisation; those held out keep the right ones.
    """

    name: str
    indices: str | None = None
    train_samples: int | None = Field(None, ge=1)
    validation_samples: int = Field(1000, ge=0)
    wrong_labels: float = Field(0.0, ge=0, lt=1)
    crop: int | None = Field(None, ge=1)
    padding: int = Field(0, ge=0)
    flip: bool = False


NAMED = {"model", "teacher", "method", "transform", "purifier"}  # the keys whose values are such


class NamedOptions(Config):
    """A name and the options of what it names."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, value: Any) -> Any:
        """Options stand beside the name in the file: ``{name: resnet18, width: 16}``."""
        if isinstance(value, str):
            return {"name": value}
        if isinstance(value, dict) and "options" not in value:
            named = {k: v for k, v in value.items() if k == "name"}
            return {**named, "options": {k: v for k, v in value.items() if k != "name"}}
        return value

    def __str__(self) -> str:
        options = ", ".join(f"{option} {value}" for option, value in self.options.items())
        return f"{self.name} with {options}" if options else self.name


def _with_options(kind: str, named: NamedOptions, known: dict[str, Any]) -> NamedOptions:
    """With the defaults of all options that are left out. Raises: UserError for one that is not known."""
    for option in named.options:
        if option not in known:
            raise unknown(f"option of {kind} {named.name}", option, known)
    return NamedOptions(name=named.name, options=known | named.options)


class PurificationConfig(AToPConfig):
    """The purifier before the classifier, which is the recipe's ``model``; the rest of its training as in ``AToP``.

    ``discriminator`` is the width of an SN-PatchGAN, null trains the purifier without. ``votes`` draws answer together.
    ``trained_classifier`` is a run whose best network the classifier is, ``trained_purifier`` an AToP run whose last
    purifier and discriminator training goes on with; each makes the phase superfluous that would train it. So may a
    purifier of the user's own, which can come trained.
    """

    transform: NamedOptions = Field(NamedOptions(name="rt2"), validate_default=True)
    purifier: NamedOptions
    discriminator: int | None = Field(64, ge=1)
    votes: int = Field(1, ge=1)
    trained_classifier: str | None = None
    trained_purifier: str | None = None

    @field_validator("transform")
    @classmethod
    def _with_transform_options(cls, named: NamedOptions) -> NamedOptions:
        known = transform_options(named.name)
        named = _with_options("transform", named, known)
        numbers = {
            option: number(value)
            for option, value in named.options.items()
            if isinstance(known[option], float) and isinstance(value, str)
        }
        return NamedOptions(name=named.name, options=named.options | numbers)

    @field_validator("purifier")
    @classmethod
    def _with_purifier_options(cls, named: NamedOptions) -> NamedOptions:
        if ":" in named.name:  # a user's own, which knows its options
            return named
        return _with_options("purifier", named, purifier_options(named.name))

    @model_validator(mode="after")
    def _parts_are_given_or_trained(self) -> "PurificationConfig":
        for key, stage in (("trained_classifier", "classifier_training"), ("trained_purifier", "pretraining")):
            if getattr(self, key) is not None and getattr(self, stage).epochs:
                raise ValueError(f"{key} is given, so that nothing is left to train before: set {stage}.epochs to 0")
        if self.trained_classifier is None and not self.classifier_training.epochs:
            raise ValueError(
                "the classifier would stay untrained: set classifier_training.epochs or trained_classifier"
            )
        if self.trained_purifier is None and not self.pretraining.epochs and ":" not in self.purifier.name:
            raise ValueError(
                "the purifier would come untrained into finetuning: set pretraining.epochs or trained_purifier"
            )
        if self.gan_gradient == "detached" and self.discriminator is None:
            raise ValueError("gan_gradient: detached is of a discriminator, and there is none: leave it out or set one")
        return self


class AttackConfig(Config):
    """The attack inside training; ``start: null`` is the method's own.

    ``bn_momentum_in_attack`` lets the passes of an attack in mode ``train`` move BatchNorm's running statistics.
    """

    steps: int = Field(10, ge=1)
    step_size: Number = Field(2 / 255, gt=0)
    start: Start | None = None
    mode: Mode = "eval"
    bn_momentum_in_attack: bool = False
    precision: Precision = "auto"

    @model_validator(mode="after")
    def _statistics_move_in_train_mode(self) -> "AttackConfig":
        if self.bn_momentum_in_attack and self.mode != "train":
            raise ValueError("bn_momentum_in_attack goes with mode: train; in mode eval statistics are fixed")
        return self


class ValidationConfig(Config):
    """PGD on the held-out images every ``every`` epochs; the best checkpoint is the most robust one there."""

    steps: int = Field(10, ge=1)
    every: int = Field(1, ge=1)


class MonitorConfig(Config):
    """Every so many steps: gradient conflict, where the loss has two parts, and the drift of BatchNorm's statistics.

    ``examples`` keeps each example's confidence in each epoch, too, in the run's ``examples.safetensors``.
    """

    every: int = Field(100, ge=1)
    examples: bool = False


class Recipe(Config):
    """Everything that a run needs; ``teacher: null`` is a second network like ``model``, if the method takes one."""

    name: str
    description: str = ""
    data: DataConfig
    model: NamedOptions
    teacher: NamedOptions | None = None
    threat: str
    method: NamedOptions
    attack: AttackConfig = AttackConfig()
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    dpls: DPLSConfig | None = None
    purification: PurificationConfig | None = None
    weight_perturbation: WeightPerturbationConfig | None = None
    weight_averaging: WeightAveragingConfig | None = None
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    epochs: int = Field(ge=1)
    batch_size: int = Field(128, ge=1)
    gradient_clip: float | None = Field(None, gt=0)
    precision: Precision = "auto"
    validation: ValidationConfig = ValidationConfig()
    monitor: MonitorConfig | None = None
    seed: int = Field(0, ge=0)

    @field_validator("model", "teacher")
    @classmethod
    def _with_model_options(cls, named: NamedOptions | None) -> NamedOptions | None:
        if named is None:
            return None
        return _with_options("model", named, model_options(named.name))

    @field_validator("method")
    @classmethod
    def _with_method_options(cls, named: NamedOptions) -> NamedOptions:
        parsed = parse_options(named.name, named.options)
        return NamedOptions(name=named.name, options=method_options(named.name) | parsed)

    @model_validator(mode="after")
    def _parts_fit(self) -> "Recipe":
        self.parsed_threat()
        if self.dpls is not None:
            check_dpls(self.dpls, self.method.name)
            total = self.epochs + int(self.method.options.get("clean_epochs", 0))
            if self.purification is not None:
                total += self.purification.classifier_training.epochs + self.purification.pretraining.epochs
            if not self.dpls.sources and (self.dpls.warmup if self.dpls.scale else self.dpls.first) >= total:
                key = "warmup" if self.dpls.scale else "first"
                raise ValueError(f"dpls.{key} must come before the end of the {total} epochs, or nothing comes of it")
            if self.label_smoothing:
                raise ValueError("dpls makes the labels soft itself; leave label_smoothing at 0")
        if self.teacher is not None:
            check_teacher(self.method.name)
        if self.method.name == "colt" and (self.weight_perturbation or self.weight_averaging):
            raise ValueError("colt freezes layers, so it goes without weight_perturbation and weight_averaging")
        check_purification(self.method.name, self.purification is not None)
        if self.purification is not None and (self.weight_perturbation or self.weight_averaging):
            raise ValueError("a purifier is trained without weight_perturbation and weight_averaging; leave them out")
        if self.purification is not None and self.purification.cross_entropy_from >= self.epochs:
            raise ValueError("purification.cross_entropy_from must come before the end of epochs; weight: 0 is without")
        return self

    def parsed_threat(self) -> LpBall:
        """The threat as an object. Raises: UserError where it is no Lp ball, for training attacks with PGD."""
        return LpBall.require(parse_threat(self.threat), "a recipe")

    def resolved(self) -> dict[str, Any]:
        """Every key with its value, as plain data that reads back to the same recipe."""
        content = self.model_dump(mode="json")
        for part in (content, content["purification"] or {}):
            for key in NAMED & part.keys():
                if part[key] is not None:
                    part[key] = {"name": part[key]["name"], **part[key]["options"]}
        return content

    def save(self, path: Path) -> None:
        """Write the resolved recipe as YAML."""
        write_atomically(path, yaml.safe_dump(self.resolved(), sort_keys=False, allow_unicode=True).encode())


SHIPPED = Path(__file__).parent


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with redan, by name."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}


def load_recipe(recipe: str | Path, overrides: dict[str, Any] | None = None) -> Recipe:
    """Read and check a recipe.

    Args:
        recipe: the name of a shipped recipe, a YAML file or a run folder.
        overrides: values by dotted key, such as ``{"optimizer.lr": 0.05}``.

    Raises:
        UserError: for a recipe that does not exist or does not hold.
    """
    path = Path(recipe)
    if path.is_dir():
        path = path / "recipe.yaml"
    if path.suffix not in (".yaml", ".yml"):
        shipped = shipped_recipes()
        if str(recipe) not in shipped:
            raise unknown("recipe", str(recipe), shipped)
        path = shipped[str(recipe)]
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"cannot read the recipe {path}: {_reason(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"the recipe {path} is not a mapping of keys to values")
    for key, value in copy.deepcopy(overrides or {}).items():  # a later key may write into the value of an earlier one
        _override(content, key.split("."), value, key)
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise UserError(f"recipe {path.stem}: {_explain(error)}") from error


def parse_overrides(assignments: list[str]) -> dict[str, Any]:
    """``["epochs=5", "optimizer.lr=0.1"]`` as a mapping; values are read as YAML.

    Raises:
        UserError: where one is not ``KEY=VALUE``.
    """
    overrides = {}
    for assignment in assignments:
        key, separator, value = assignment.partition("=")
        if not separator or not key:
            raise UserError(f"an override is written KEY=VALUE, such as optimizer.lr=0.05, got {assignment!r}")
        try:
            overrides[key] = yaml.safe_load(value)
        except (ValueError, yaml.YAMLError) as error:
            raise UserError(f"the value of override {assignment!r} is not valid YAML") from error
    return overrides


def _override(content: dict[str, Any], keys: list[str], value: Any, whole: str) -> None:
    for key in keys[:-1]:
        below = content.get(key)
        if below is None:
            below = {}
        elif isinstance(below, str) and key in NAMED:
            below = {"name": below}  # the short form
        if not isinstance(below, dict):
            raise UserError(f"override {whole!r}: {key} has no keys below it")
        content[key] = below
        content = below
    content[keys[-1]] = value


def _reason(error: OSError | ValueError | yaml.YAMLError) -> str:
    """Why a file could not be read, in one line."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).splitlines()[0]


def _explain(error: ValidationError) -> str:
    """The first fault in one line, with the nearest right key for a misspelt one."""
    fault = error.errors()[0]
    where = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        known = _keys_at(fault["loc"][:-1])
        near = difflib.get_close_matches(str(fault["loc"][-1]), known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"no key {where!r}{hint} (there are: {', '.join(known)})"
    if fault["type"] == "missing":
        return f"the key {where!r} is missing"
    if fault["type"] == "value_error":  # from a check of redan's own, which says what it got
        return f"{where}: ".removeprefix(": ") + fault["msg"].removeprefix("Value error, ")
    return f"{where}: {fault['msg']}, got {fault['input']!r}"


def _keys_at(location: tuple[int | str, ...]) -> list[str]:
    model: Any = Recipe
    for part in location:
        annotation = model.model_fields[str(part)].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        model = next(c for c in candidates if isinstance(c, type) and issubclass(c, Config))
    return sorted(model.model_fields)
