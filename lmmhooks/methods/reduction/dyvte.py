"""
Visual-token exit: from some decoder layer on, all visual tokens leave at once.

By then, the text before an answer has taken in what it needs of the image. Fixed layers are fine for multiple choice
and bad for open answers (Flickr30k CIDEr 44.5 instead of 74.9 on LLaVA-1.5-7B, measured by the authors of ShortV).

Papers: "Accelerating Multimodal Large Language Models via Dynamic Visual-Token Exit and the Empirical Findings",
NeurIPS 2025, arXiv 2411.19628, code github.com/DoubtedSteam/DyVTE: a trained gate per layer; and "Boosting Multimodal
Large Language Models with Visual Tokens Withdrawal for Rapid Inference" (VTW), AAAI 2025, arXiv 2405.05803, code
github.com/lzhxmu/VTW: a fixed layer (both implemented from their descriptions). The rules 'mass' and 'drift' are
extensions without published figures. Differs from DyVTE's code in that a prompt at which no gate fires keeps its image
(the code fails at the first generated token) and in that batches and several images work.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lmmhooks.errors import MethodError
from lmmhooks.methods.base import Method, names_record, setting
from lmmhooks.methods.probe import Probe
from lmmhooks.methods.reduction.base import Cut, Newline, Positions, ReductionMethod, Scope, TokenGroup
from lmmhooks.methods.reduction.exits import gate_exits, gate_features, image_drift
from lmmhooks.methods.tensors import TensorSet

__all__ = ["DyVTE"]


@dataclass(frozen=True)
class DyVTE(ReductionMethod):
    """
    All visual tokens of a prompt leave before one decoder layer: fixed, or found for every prompt while it is read.

    There is no ``keep`` and no ``budget``: what a prompt costs follows from where its image leaves. A ``layer`` past
    the last does nothing.
    """

    id: ClassVar[str] = "dyvte"
    paper: ClassVar[str] = "Dynamic Visual-Token Exit, NeurIPS 2025, arXiv 2411.19628; VTW, AAAI 2025, arXiv 2405.05803"
    code: ClassVar[str] = "https://github.com/DoubtedSteam/DyVTE"
    cut_settings: ClassVar[tuple[str, ...]] = ("layer",)
    calibrated: ClassVar[Mapping[str, Literal["wrap", "command"]]] = {"layer": "command"}

    keep: None = field(default=None, init=False)
    budget: None = field(default=None, init=False)
    positions: Positions = setting(
        "keep", help="'keep' leaves text its positions (VTW: pe='keep'); 'repack' renumbers it; 'auto' is 'keep'."
    )
    newline: Newline = field(default="rank", init=False)
    rule: Literal["fixed", "mass", "drift", "gate"] = setting(
        "fixed",
        help="'fixed': before `layer` (VTW); 'gate': behind the first layer whose trained gate says so (DyVTE); "
        "'mass', 'drift' (extensions): behind the second layer in a row where the last prompt token looks little at "
        "the image, or where the image moves its head outputs little.",
    )
    layer: int | str | None = setting(
        "half",
        help="'fixed': decoder layer, 0-based, from which on there is no visual token. 'half': half the depth (16 of "
        "32, 20 of 40, as other papers run VTW; its demo: 15); None: what `lmmhooks calibrate dyvte` found for this "
        "checkpoint; a path ending in .json: such a record.",
    )
    first: int | None = setting(
        None, help="'mass', 'drift': first layer behind which tokens may leave, 0-based. None: 0.4 of the depth."
    )
    tau: float = setting(0.02, help="'mass': attention on the image below which a layer counts, head mean, >= 0.")
    eps: float = setting(0.05, help="'drift': relative change of head outputs below which a layer counts, >= 0.")
    gate_path: str | None = setting(
        None,
        help="'gate': file (.safetensors, .pt, .pth, .bin) with weights visual_gates_router.<layer>.w1.weight and "
        "w2.weight, any prefix.",
    )
    gates: TensorSet | None = setting(None, help="'gate': the weights themselves, by '<layer>.w1' and '<layer>.w2'.")

    def __post_init__(self) -> None:
        super().__post_init__()
        rules = ("fixed", "mass", "drift", "gate")
        self._require(self.rule in rules, "rule", "one of " + ", ".join(map(repr, rules)))
        number = isinstance(self.layer, int) and not isinstance(self.layer, bool) and self.layer >= 0
        named = self.layer in (None, "half") or names_record(self.layer)
        self._require(number or named, "layer", "a layer >= 0, 'half', the path of a record (.json) or None")
        self._require(self.first is None or self.first >= 0, "first", ">= 0")
        self._require(self.tau >= 0, "tau", ">= 0")
        self._require(self.eps >= 0, "eps", ">= 0")
        given = self.gate_path is not None or self.gates is not None
        self._require(
            given == (self.rule == "gate"), "rule", "'gate' where gate_path or gates is given, and only there"
        )
        if self.rule != "fixed":
            self._require(self.layer is not None and not names_record(self.layer), "layer", "left out but for 'fixed'")

    def bind(self, family: Any) -> Method:
        if self.gate_path is None:
            return self
        bound = replace(self, gate_path=None, gates=_read_gates(Path(self.gate_path).expanduser()))
        bound.check(family)
        return bound

    def check(self, family: Any) -> None:
        super().check(family)
        if 0 < self._first(family) < family.deepstack_layers:
            raise MethodError(
                f"{self.id}: visual features enter {family.name} again behind decoder layers up to "
                f"{family.deepstack_layers - 1}, so visual tokens cannot leave before layer {self._first(family)}; use "
                f"{family.deepstack_layers} or more"
            )
        if self.gates is not None:
            wanted = 2 * family.hidden_size
            for layer in range(family.num_layers):
                inner, outer = (self.gates.get(f"{layer}.{name}") for name in ("w1", "w2"))
                if (
                    inner is None
                    or outer is None
                    or inner.dim() != 2
                    or (inner.shape[1], *outer.shape) != (wanted, 2, len(inner))
                ):
                    raise MethodError(
                        f"{self.id}: gates of layer {layer} do not fit {family.name}: needed are w1 [hidden, {wanted}] "
                        f"and w2 [2, hidden]; train or take gates of this model"
                    )

    @property
    def scope(self) -> Scope:
        return "sample"

    def repacks(self, family: Any) -> bool:
        return self.positions == "repack"

    def _first(self, family: Any) -> int:
        """First layer before which tokens may leave."""
        if self.rule == "fixed":
            # A record that has not been read yet stands for some layer.
            return self.layer if isinstance(self.layer, int) else round(family.num_layers / 2)
        if self.rule == "gate":
            return max(1, family.deepstack_layers)
        return (round(0.4 * family.num_layers) if self.first is None else self.first) + 1

    def cuts(self, family: Any) -> list[Cut]:
        first = self._first(family)
        if self.rule == "fixed":
            return [Cut(first, 0)] if first < family.num_layers else []
        return [Cut(layer, None) for layer in range(first, family.num_layers)]

    def probes(self, family: Any) -> list[Probe]:
        cuts = self.cuts(family)
        if self.rule not in ("mass", "drift") or not cuts:
            return []
        return [self._probe(layer) for layer in range(max(cuts[0].layer - 2, 0), cuts[-1].layer)]

    def _probe(self, layer: int) -> Probe:
        if self.rule == "mass":
            return Probe("decoder_rows", layer, "last")
        return Probe("decoder_rows", layer, "last", reduce=image_drift, label="drift")

    def select(self, tokens: TokenGroup) -> Tensor:
        index = torch.arange(tokens.num_keep, device=tokens.position.device)
        return torch.where(self._exits(tokens)[:, None], -1, index)

    def _exits(self, tokens: TokenGroup) -> Tensor:
        """``[G]`` bool: whose visual tokens leave."""
        if self.gates is not None:
            weights = self.gates.on(tokens.hidden.device)
            features = gate_features(tokens.hidden, tokens.layout)
            inner, outer = (weights[f"{tokens.layer - 1}.{name}"] for name in ("w1", "w2"))
            return gate_exits(features, inner, outer)[tokens.sample]
        layers = range(max(tokens.layer - 2, 0), tokens.layer)
        seen = torch.stack([tokens.probes[self._probe(layer).name] for layer in layers])
        if self.rule == "mass":
            return (seen.sum(dim=-1) < self.tau).all(dim=0)
        return (seen[..., 0] < self.eps).all(dim=0)


def _read_gates(file: Path) -> TensorSet:
    """Weights of trained gates from a file in which others may lie too."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if file.suffix == ".safetensors":
            found = load_file(file)
        else:
            found = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, UnpicklingError, RuntimeError, ValueError, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise MethodError(f"dyvte: gate_path {file} cannot be read ({reason}); give a weight file") from None
    gates = {}
    for name, tensor in found.items() if isinstance(found, Mapping) else ():
        _, marked, rest = str(name).rpartition("visual_gates_router.")
        if marked and isinstance(tensor, Tensor):
            gates[rest.removesuffix(".weight")] = tensor
    if not gates:
        raise MethodError(
            f"dyvte: gate_path {file} holds no weights called visual_gates_router.<layer>.w1.weight; give gates as "
            "DyVTE's code saves them"
        )
    return TensorSet(gates)
