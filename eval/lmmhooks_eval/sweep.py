"""
Sweeps: the same methods at several budgets, written once.

A sweep is shorthand for variants: ``fastervlm`` at budgets 0.5 and 0.25 becomes ``fastervlm@50`` and ``fastervlm@25``,
the figure being per cent of the visual tokens, averaged over decoder layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

__all__ = ["SweepPlan", "split_name", "variant_name"]

Budget = Annotated[float, Field(gt=0, le=1)]


class SweptMethod(BaseModel):
    """One method of a sweep."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str | dict[str, Any] = Field(description="Method with its settings, without a budget.")
    setting: Literal["budget", "keep"] = Field(
        default="budget",
        description="What to set. keep is for methods without budget that cut once, before the decoder: there the "
        "share kept is the mean over layers.",
    )
    budgets: list[Budget] | None = Field(
        default=None, description="Those it can meet; unset: all of the sweep. Late cuts cannot meet small ones."
    )


class SweepPlan(BaseModel):
    """Methods and the budgets that each of them is run at."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    budgets: list[Budget] = Field(min_length=1, description="Shares of the visual tokens, mean over decoder layers.")
    methods: dict[str, SweptMethod] = Field(min_length=1, description="Name -> method.")

    @field_validator("methods", mode="before")
    @classmethod
    def _bare(cls, methods: Any) -> Any:
        if not isinstance(methods, Mapping):
            return methods
        return {name: value if _is_full(value) else {"method": value} for name, value in methods.items()}

    def variants(self) -> dict[str, list[str | dict[str, Any]]]:
        """The variants this sweep stands for, by name."""
        return {
            variant_name(name, budget): [_with_share(swept.method, swept.setting, budget)]
            for name, swept in self.methods.items()
            for budget in swept.budgets or self.budgets
        }


def variant_name(method: str, budget: float) -> str:
    """``fastervlm@12.5`` for an eighth of the tokens."""
    return f"{method}@{100 * budget:g}"


def split_name(variant: str) -> tuple[str, float] | None:
    """Method and budget of a variant of a sweep; None for any other name."""
    method, at, percent = variant.rpartition("@")
    try:
        return (method, float(percent) / 100) if at else None
    except ValueError:
        return None


def _is_full(value: Any) -> bool:
    return isinstance(value, Mapping) and "method" in value


def _with_share(method: str | dict[str, Any], setting: str, share: float) -> str | dict[str, Any]:
    if isinstance(method, dict):
        return {name: {**(settings or {}), setting: share} for name, settings in method.items()}
    if method.endswith(")"):
        return f"{method[:-1]}, {setting}={share})"
    return f"{method}({setting}={share})"
