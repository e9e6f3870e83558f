"""Typed settings: the base class of every room's configuration, and errors that name the nearest key."""

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from lalia.errors import UserError

Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
"""What random generators take."""


class Settings(BaseModel):
    """Immutable, typed settings in which an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool):
            annotation = cls.model_fields[str(info.field_name)].annotation
            if annotation in (int, float) or {int, float} & set(get_args(annotation)):
                raise ValueError("expected a number")  # pydantic would take true as 1
        return value

    @classmethod
    def parse(cls, values: Mapping[str, Any], where: str = "recipe") -> Self:
        """Validate `values`, reporting every problem at once.

        Args:
            values: nested mapping of settings, as read from TOML.
            where: what to call the source in the message, for example the recipe's path.

        Raises:
            UserError: one line per problem, each with the key, the value received and what was expected; unknown
                keys name the nearest known one.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            problems = [_describe(cls, problem) for problem in error.errors(include_url=False)]
            raise UserError(f"{where}: " + "; ".join(problems)) from None


def _describe(root: type[BaseModel], problem: Any) -> str:
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location) or "(top level)"
    if problem["type"] == "extra_forbidden":
        known = _known_keys(root, location[:-1])
        nearest = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.4)
        hint = f", did you mean {'.'.join([*location[:-1], nearest[0]])!r}?" if nearest else ""
        return f"unknown key {key!r}{hint or ', known keys here: ' + ', '.join(known)}"
    message = problem["msg"].removeprefix("Value error, ")
    if isinstance(problem["input"], Mapping):  # a rule about several keys, which the message names
        return f"{key}: {message}"
    return f"{key} = {problem['input']!r}: {message}"


def _known_keys(model: type[BaseModel], path: list[str]) -> list[str]:
    for part in path:
        field = model.model_fields.get(part)
        annotation = field.annotation if field else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return sorted(model.model_fields)
