"""Finding, reading and overriding recipe files; every complaint is one line that names the file and the key."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from lmmhooks.errors import closest
from lmmhooks_eval.errors import RecipeError
from lmmhooks_eval.recipe import Recipe

__all__ = ["apply_overrides", "build", "find", "folder", "load", "shipped"]


def folder() -> Path:
    """
    Where the shipped recipes are: beside this module in an installed package, at the top of a checkout.

    Raises
    ------
    RecipeError
        If neither exists.
    """
    here = Path(__file__).resolve().parent
    for candidate in (here / "recipes", here.parents[1] / "recipes"):
        if candidate.is_dir():
            return candidate
    raise RecipeError("the shipped recipes are missing from this installation; reinstall lmmhooks")


def shipped() -> dict[str, Path]:
    """Every shipped recipe: name (the path below the folder without its ending) to file, sorted."""
    root = folder()
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in sorted(root.rglob("*.yaml"))}


def find(recipe: str) -> Path:
    """
    The file of a recipe given by path or by the name of a shipped one.

    Raises
    ------
    RecipeError
        If there is no such file and no such name.
    """
    path = Path(recipe)
    if path.is_file():
        return path
    known = shipped()
    if recipe in known:
        return known[recipe]
    raise RecipeError(
        f"no recipe {recipe!r}: neither a file nor shipped{closest(recipe, known)}; shipped: {', '.join(known)}"
    )


def load(recipe: str, overrides: Sequence[str] = ()) -> Recipe:
    """
    Read and check a recipe.

    Parameters
    ----------
    recipe
        Path of a YAML file, or name of a shipped recipe.
    overrides
        ``"key.path=value"`` each, as in `apply_overrides`.

    Raises
    ------
    RecipeError
        If it cannot be found or read, or does not fit the schema.
    """
    path = find(recipe)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"recipe {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise RecipeError(f"recipe {path} must be a mapping with keys such as model, tasks and variants")
    return build(apply_overrides(data, overrides), str(path))


def build(data: Mapping[str, Any], origin: str) -> Recipe:
    """Check plain data against the schema; `origin` names it in errors. Raises `RecipeError`."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(explain(error, data, origin)) from error


def apply_overrides(data: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """
    Set values deep inside recipe data.

    Parameters
    ----------
    data
        The recipe as read; not changed.
    overrides
        ``"a.b=value"``: the value is read as YAML and typed by the schema. Tasks are addressed by number or by name
        (``tasks.scenes-pope.limit=40``); a mapping that is missing on the way is made.

    Raises
    ------
    RecipeError
        If an override has no ``=``, or its path leads through something that has no keys.
    """
    result = _copy(data)
    for override in overrides:
        path, separator, text = override.partition("=")
        if not separator or not path:
            raise RecipeError(f"--set {override!r} is not of the form key.path=value, e.g. tasks.scenes-pope.limit=40")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RecipeError(f"--set {override!r}: the value is not valid YAML; quote it") from error
        *parents, last = path.split(".")
        node: Any = result
        for step in parents:
            node = _descend(node, step, override)
        if isinstance(node, list):
            node[_index(node, last, override)] = value
        elif isinstance(node, dict):
            node[last] = value
        else:
            raise RecipeError(f"--set {override!r}: {'.'.join(parents)} has no keys")
    return result


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_copy(item) for item in value]
    return value


def _descend(node: Any, step: str, override: str) -> Any:
    if isinstance(node, list):
        index = _index(node, step, override)
        if isinstance(node[index], str):
            # A task written as a bare name has to become a mapping before anything can be set in it.
            node[index] = {"name": node[index]}
        return node[index]
    if isinstance(node, dict):
        if node.get(step) is None:
            node[step] = {}
        return node[step]
    raise RecipeError(f"--set {override!r}: nothing to set below {step!r}")


def _index(items: list[Any], step: str, override: str) -> int:
    names = [item if isinstance(item, str) else item.get("name") if isinstance(item, dict) else None for item in items]
    if step in names:
        return names.index(step)
    if step.isdecimal() and int(step) < len(items):
        return int(step)
    known = [name for name in names if isinstance(name, str)]
    raise RecipeError(f"--set {override!r}: no entry {step!r}{closest(step, known)}; entries: {', '.join(known)}")


def explain(error: ValidationError, data: Mapping[str, Any], origin: str) -> str:
    """
    The first complaint of a validation error as one line: place, value, what is allowed, nearest name of a wrong key.
    """
    problems = error.errors()
    first = problems[0]
    place = ".".join(str(part) for part in first["loc"])
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if first["type"] == "extra_forbidden":
        key, known = str(first["loc"][-1]), _fields_at(first["loc"][:-1])
        return f"recipe {origin}: unknown key {place!r}{closest(key, known)}; allowed here: {', '.join(known)}{more}"
    if first["type"] == "missing":
        return f"recipe {origin}: the required key {place!r} is missing{more}"
    message = first["msg"].removeprefix("Value error, ")
    given = first["input"]
    shown = f", got {given!r}" if isinstance(given, (str, int, float, bool, type(None))) else ""
    return f"recipe {origin}: {place}: {message[:1].lower()}{message[1:]}{shown}{more}"


def _fields_at(location: Sequence[str | int]) -> list[str]:
    """Keys of the schema at a place of the recipe; walks the field types, since the place may be inside a list."""
    model: type[BaseModel] = Recipe
    for part in location:
        if isinstance(part, int) or part not in model.model_fields:
            continue
        annotation = model.model_fields[part].annotation
        inner = next((kind for kind in _types_in(annotation) if issubclass(kind, BaseModel)), None)
        model = inner or model
    return list(model.model_fields)


def _types_in(annotation: Any) -> list[type]:
    if isinstance(annotation, type) and not hasattr(annotation, "__args__"):
        return [annotation]
    return [kind for argument in getattr(annotation, "__args__", ()) for kind in _types_in(argument)]
