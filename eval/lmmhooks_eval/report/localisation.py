"""How well maps find objects, as a section of a results page; every sentence is written by rule from the record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lmmhooks_eval import stats
from lmmhooks_eval.localisation import CHANCE
from lmmhooks_eval.report.markdown import setting_line

__all__ = ["best_entries", "localisation_page"]

_LEVEL = 0.05


def localisation_page(record: Mapping[str, Any], link: str, pictures: Sequence[str] = ()) -> str:
    """
    The section of one model in Markdown.

    Parameters
    ----------
    record
        As ``scripts/measure_maps.py`` writes it.
    link
        Where it lies, relative to the page.
    pictures
        Tasks with a sheet of pictures, which lies beside it under the same name.
    """
    parts = [f"## {record['model']}\n\n{setting_line(record['environment'])} [{link}]({link})\n"]
    for name, task in record["tasks"].items():
        parts.append(f"### {name}\n\n{task['documents']} documents about {task['images']} images.\n")
        if name in pictures:
            parts.append(f"![Maps of {record['model']} on {name}]({link.removesuffix('.json')}-{name}.png)\n")
        parts.append(f"{_table(task)}\n{_reading(task)}\n{_by_layer(task)}")
    return "\n".join(parts)


def best_entries(task: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Of every source the layer that hits most often, best sources first, chance last."""
    best: dict[str, Mapping[str, Any]] = {}
    for entry in task["sources"]:
        held = best.get(entry["source"])
        if held is None or entry["hit"]["value"] > held["hit"]["value"]:
            best[entry["source"]] = entry
    return sorted(best.values(), key=lambda entry: (entry["source"] == CHANCE, -entry["hit"]["value"]))


def _table(task: Mapping[str, Any]) -> str:
    groups = [group for group in task["groups"] if task["groups"][group]]
    header = ["map", "layer", "hit %", "over chance", "pointing %", "mass %", "ratio", "IoU %"]
    header += [f"hit %, {group} (n = {task['groups'][group]})" for group in groups]
    rows = []
    for entry in best_entries(task):
        low, high = (100 * bound for bound in entry["hit"]["interval"])
        over = entry["against_chance"]
        beyond = f"{100 * over['difference']:+.1f} [{', '.join(f'{100 * bound:+.1f}' for bound in over['interval'])}]"
        rows.append(
            [
                f"`{entry['source']}`",
                "-" if entry["layer"] is None else str(entry["layer"]),
                f"{100 * entry['hit']['value']:.1f} [{low:.1f}, {high:.1f}]",
                "-" if entry["source"] == CHANCE else beyond,
                *(f"{100 * entry[name]['value']:.1f}" for name in ("pointing", "mass")),
                f"{entry['ratio']['value']:.2f}",
                f"{100 * entry['iou']['value']:.1f}",
                *(f"{100 * entry['by_group'][group]:.0f}" for group in groups),
            ]
        )
    return _markdown(header, rows)


def _reading(task: Mapping[str, Any]) -> str:
    entries = [entry for entry in task["sources"] if entry["source"] != CHANCE]
    corrected = stats.holm([entry["against_chance"]["p"] for entry in entries])
    sure: dict[str, bool] = {}
    for entry, p in zip(entries, corrected, strict=True):
        above = p < _LEVEL and entry["against_chance"]["difference"] > 0
        sure[entry["source"]] = sure.get(entry["source"], False) or above
    sides = [
        ", ".join(f"`{name}`" for name, found in sure.items() if found == side) or "none" for side in (True, False)
    ]
    return (
        f"At {100 * _LEVEL:g} % after Holm's correction over all maps and layers: finds more than chance does, in one "
        f"layer at least, {sides[0]}; not shown to, {sides[1]}.\n"
    )


def _by_layer(task: Mapping[str, Any]) -> str:
    layered: dict[str, dict[int, float]] = {}
    for entry in task["sources"]:
        if entry["layer"] is not None:
            layered.setdefault(entry["source"], {})[entry["layer"]] = entry["hit"]["value"]
    if not layered:
        return ""
    layers = sorted({layer for found in layered.values() for layer in found})
    rows = [
        [f"`{source}`", *(f"{100 * found[layer]:.0f}" if layer in found else "-" for layer in layers)]
        for source, found in layered.items()
    ]
    return _markdown(["hit % by layer", *map(str, layers)], rows) + "\n"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
