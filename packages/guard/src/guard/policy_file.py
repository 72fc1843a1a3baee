"""The YAML form of a policy: read strictly, told precisely what is wrong.

Keys: name, version, threshold, window, context, categories; of a category: code, name, description,
threshold, enabled, hazard. A category whose code the standard taxonomy knows may leave its name out.
"""

from collections.abc import Hashable
from datetime import date
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from core_llm.errors import UserError
from guard.policy import Categories, Category, Policy
from guard.taxonomy import CATEGORIES

Fraction = Annotated[float, Field(gt=0, lt=1)]
# YAML reads `version: 2` as a number and `version: 2026-11-21` as a date.
Version = Annotated[
    str,
    BeforeValidator(lambda v: str(v) if isinstance(v, int | float | date) and not isinstance(v, bool) else v),
    Field(min_length=1, max_length=200),
]
Line = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\r\n]*\S[^\r\n]*$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class CategoryFile(_Strict):
    """One entry of `categories`."""

    code: str = Field(pattern=r"^[A-Za-z][A-Za-z0-9_.-]{0,31}$")
    name: Line | None = None
    description: str = Field("", max_length=4000)
    threshold: Fraction | None = None
    enabled: bool = True
    hazard: str | None = None

    @model_validator(mode="after")
    def _known(self) -> "CategoryFile":
        if self.name is None and self.code not in CATEGORIES:
            raise ValueError(f"a category of its own needs a name ({self.code} is none of S1 to S14)")
        if self.hazard is not None and self.hazard not in CATEGORIES:
            raise ValueError(f"hazard {self.hazard[:20]} is none of {', '.join(CATEGORIES)}")
        return self


class PolicyFile(_Strict):
    """The whole file."""

    name: Line = "unnamed"
    version: Version = "1"
    threshold: Fraction | None = None
    window: int = Field(256, ge=8, le=100_000)
    context: int = Field(256, ge=0, le=100_000)
    categories: list[CategoryFile] = Field(min_length=1, max_length=200)


class _Loader(yaml.SafeLoader):
    """Plain YAML: no key twice, no anchors (a few lines of which can stand for gigabytes)."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(
                None, None, "aliases are not allowed", self.peek_event().start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key '{str(key.value)[:40]}' is there twice", key.start_mark
                )
            seen.add(key.value)
        return dict(super().construct_mapping(node, deep))


def parse(content: bytes, where: str) -> Policy:
    """The policy in a file's content; raises `UserError` with the place of the first mistake."""
    try:
        values = yaml.load(content.decode("utf-8"), _Loader)
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text") from error
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{where}{line}: not valid YAML ({error.problem})") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UserError(f"{where}: not valid YAML ({type(error).__name__})") from error
    if not isinstance(values, dict):
        raise UserError(f"{where}: a policy is a mapping with the keys {', '.join(PolicyFile.model_fields)}")
    try:
        read = PolicyFile.model_validate(values)
        return _policy(read)
    except ValidationError as error:
        raise UserError(f"{where}: {_explain(error)}") from error
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _policy(read: PolicyFile) -> Policy:
    rows = [
        Category(c.code, c.name or CATEGORIES[c.code], c.description, c.threshold, c.enabled, c.hazard)
        for c in read.categories
    ]
    twice = sorted({row.code for row in rows if sum(other.code == row.code for other in rows) > 1})
    if twice:
        raise UserError(f"categories: code {twice[0]} is there twice")
    return Policy(Categories(rows), False, read.window, read.context, read.threshold, read.name, read.version)


def _explain(error: ValidationError) -> str:
    """The first mistake: the path of the key, what is wrong, and for an unknown key which ones there are."""
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(part) for part in first["loc"]) or "the file"
    if first["type"] == "extra_forbidden":
        known = CategoryFile if len(first["loc"]) > 1 else PolicyFile
        return f"{place}: unknown key; allowed are {', '.join(known.model_fields)}"
    return f"{place}: {first['msg']}"
