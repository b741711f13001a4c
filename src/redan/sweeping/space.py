"""The space of a search: which values each key of a recipe may take, read from YAML and checked.

```yaml
optimizer.lr: {low: 0.01, high: 0.3, log: true}
attack.step_size: {low: 1/255, high: 4/255}
batch_size: {low: 50, high: 200, step: 50}
method.layers: {choices: [[layer4], [layer3, layer4]]}
```
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from optuna import Trial
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from redan.errors import UserError, unknown
from redan.methods.base import Config
from redan.recipes import schema
from redan.sweeping.text import flow, plain_value
from redan.threats import parse_number

SHIPPED = Path(schema.__file__).parent / "spaces"


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"{value} is not a number such as 0.5 or 8/255")
    try:
        return value if isinstance(value, int) else parse_number(value)
    except UserError as error:
        raise ValueError(str(error)) from error


Number = Annotated[int | float, BeforeValidator(_number)]  # a whole number stays one


class Range(Config):
    """Numbers from ``low`` to ``high``, both included; whole ones where all that is given here is whole.

    ``log`` draws evenly over the logarithm, ``step`` only ``low + k * step``.
    """

    low: Number
    high: Number
    log: bool = False
    step: Number | None = None

    @model_validator(mode="after")
    def _bounds_fit(self) -> "Range":
        if self.low >= self.high:
            raise ValueError(f"low must be below high, got {self.low} and {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"log needs a low above 0, got {self.low}")
        if self.log and self.step is not None:
            raise ValueError("log and step exclude each other; leave one of them out")
        if self.step is not None and not 0 < self.step <= self.high - self.low:
            raise ValueError(f"step must be above 0 and at most high - low, got {self.step}")
        return self

    def draw(self, trial: Trial, key: str) -> Any:
        """A value for the trial; the one that it has, where it has one."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # where no whole number of steps leads to high, it is lowered to the last
            if all(isinstance(number, int) for number in (self.low, self.high, self.step or 1)):
                return trial.suggest_int(key, int(self.low), int(self.high), log=self.log, step=int(self.step or 1))
            return trial.suggest_float(key, self.low, self.high, log=self.log, step=self.step)

    def value(self, drawn: Any) -> Any:
        """The recipe's value for what a trial keeps."""
        return drawn

    def ends(self) -> list[Any]:
        """What shows whether the recipe takes all that may be drawn."""
        return [self.low, self.high]


class Choices(Config):
    """Any of some values, of which none is nearer to one than to another."""

    choices: Annotated[list[Any], Field(min_length=1)]

    def draw(self, trial: Trial, key: str) -> Any:
        """See ``Range``; kept as text, for a storage keeps neither lists nor mappings."""
        return self.value(trial.suggest_categorical(key, [flow(choice) for choice in self.choices]))

    def value(self, drawn: Any) -> Any:
        """See ``Range``."""
        return next(choice for choice in self.choices if flow(choice) == drawn)

    def ends(self) -> list[Any]:
        """See ``Range``."""
        return self.choices


Space = dict[str, Range | Choices]


def shipped_spaces() -> dict[str, Path]:
    """The spaces that come with redan, by name."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}


def load_space(space: str | Path | Mapping[str, Any]) -> Space:
    """Read and check a space; whether a recipe has its keys is another question.

    Args:
        space: the name of a shipped one, a YAML file, or its content.

    Raises:
        UserError: for a space that does not exist or does not hold.
    """
    if isinstance(space, Mapping):
        return _checked("the space", dict(space))
    path = Path(space)
    if path.suffix not in (".yaml", ".yml"):
        if str(space) not in (shipped := shipped_spaces()):
            raise unknown("space", str(space), shipped)
        path = shipped[str(space)]
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"cannot read the space {path}: {reason}") from error
    return _checked(f"space {path}", content)


def _checked(where: str, content: Any) -> Space:
    if not isinstance(content, dict) or not content:
        raise UserError(f"{where} is not a mapping of a recipe's keys, such as optimizer.lr: {{low: 0.01, high: 0.1}}")
    space: Space = {}
    for key, entry in content.items():
        if not isinstance(entry, dict):
            raise UserError(f"{where}: {key} takes {{low: ..., high: ...}} or {{choices: [...]}}, got {entry!r}")
        kind = Choices if "choices" in entry else Range
        for field in entry:
            if field not in kind.model_fields:
                raise UserError(f"{where}: {key}: {unknown('key', str(field), kind.model_fields)}")
        try:
            space[str(key)] = kind.model_validate(plain_value(str(key), entry))
        except ValidationError as error:
            fault = error.errors()[0]
            field = ".".join(str(part) for part in fault["loc"][:1])
            reason = "is missing" if fault["type"] == "missing" else fault["msg"].removeprefix("Value error, ")
            raise UserError(f"{where}: {key}: {field} {reason}".replace(":  ", ": ")) from error
    return space
