"""
One row per method: the settings under which it runs on the tiny random models, and where it is refused by design.

A new method adds its row here and inherits every test of this folder on every family.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lmmhooks.methods.tensors import TensorSet
from tests.clips import tiny_clip

__all__ = ["ROWS", "Row"]


def random_directions(family: Any) -> dict[str, Any]:
    """Directions of steering for a model, one for all tokens of its vision tower."""
    generator = torch.Generator().manual_seed(0)
    (*_, last) = (m for m in family.mlp_of(family.vision_layers[0]).modules() if isinstance(m, nn.Linear))
    textual = torch.randn(family.num_layers, family.hidden_size, generator=generator)
    visual = torch.randn(len(family.vision_layers), 1, last.out_features, generator=generator)
    return {"directions": TensorSet({"textual": textual, "visual": visual})}


@dataclass(frozen=True)
class Row:
    """
    Parameters
    ----------
    spec
        Settings that act visibly on models of four layers with 64 channels and about 16 visual tokens per image.
    changes
        Whether logits of a prompt with an image must differ from the unpatched model; False: they must be equal.
    refused
        Family to a part of the reason for which wrap refuses it.
    after_prompt
        It acts on what follows the prompt: logits of the prompt itself must be equal, those of the answer differ.
    measured
        For a `lmmhooks.family.Family`, settings that `lmmhooks calibrate` would have left on record, by name.
    modes
        Way of running a prompt to a part of the reason for which ``generate`` refuses it.
    answer
        For methods that answer through `Patch.answer`: what that call is given beside image and question; None for the
        others.
    files
        Writes what the method reads into a folder, and returns the settings that name it.
    """

    spec: str
    changes: bool = True
    after_prompt: bool = False
    refused: dict[str, str] = field(default_factory=dict)
    measured: Callable[[Any], dict[str, Any]] | None = None
    modes: dict[str, str] = field(default_factory=dict)
    answer: dict[str, Any] | None = None
    files: Callable[[Path], dict[str, Any]] | None = None


#: Towers whose layers cannot do with fewer patches, and why.
WHOLE_TOWERS = {
    "qwen2_vl": "of all patches",
    "qwen2_5_vl": "attends inside windows",
    "qwen3_vl": "of all patches",
    "internvl": "more than attention and MLP",
}

#: Models whose number of visual tokens does not follow the size of the image.
ONE_RESOLUTION = dict.fromkeys(
    ("llava", "llava_next", "llava_onevision", "internvl"), "does not follow the size of the image"
)

#: Ways that are no beam search, and what a beam search says of them.
NOT_BEAMS = {
    "decode": "greedy search",
    "padded batch": "greedy search",
    "two images": "greedy search",
    "sampling": "asks for sample",
}

#: Ways of a method that answers through `Patch.answer` alone.
NOT_GENERATED = dict.fromkeys(("decode", "padded batch", "two images", "beams", "sampling"), "call patch.answer")


def answering(spec: str, *, files: Any = None, refused: dict[str, str] | None = None, **answer: Any) -> Row:
    """Row of a method that answers through `Patch.answer` alone, which is given ``answer``."""
    return Row(spec, after_prompt=True, modes=NOT_GENERATED, answer=answer, files=files, refused=refused or {})


#: What a caller points at in the image of the tests.
REGION = (12.0, 6.0, 44.0, 30.0)

ROWS: dict[str, Row] = {
    "attention-identity": Row("attention-identity", changes=False),
    "var": Row("var(sink_dims='any', tau=2.6, rho=0.3)"),
    "cmai": Row("cmai(focus_layer=1)"),
    "gift": Row("gift(question_skip=(1, 0))"),
    "vaf": Row("vaf(enh=1.5, sup=0.5)"),
    "adaptvis": Row("adaptvis(low=0.5, high=2.0, threshold=0.1)"),
    "spin": Row("spin(keep_ratio=0.5)"),
    "vista": Row("vista(lam=0.5)"),
    "memvr": Row("memvr(start=0, end=3, ratio=0.3, threshold=0.5)"),
    "pai": Row("pai(alpha=0.8, gamma=1.5, plausibility=0.0)"),
    "fix-imbalance": Row("fix-imbalance(alpha=1.0, beta=1.0, local_ratio=0.5, gamma=1.0)"),
    "heads-guided": Row("heads-guided(start=0, alpha=1.0)"),
    "act": Row("act(heads='all', thr=0.05)"),
    "vhr": Row("vhr"),
    "vti": Row("vti(factor=0.5)", measured=random_directions),
    "reduction-identity": Row("reduction-identity", changes=False),
    "random": Row("random(keep=4)"),
    "uniform-grid": Row("uniform-grid(keep=4)"),
    "downsample": Row("downsample(keep=0.25)"),
    "fastervlm": Row("fastervlm(keep=4)"),
    "vtc-cls": Row("vtc-cls(keep=4, start=0)"),
    "hiprune": Row("hiprune(keep=6, alpha=0.8)"),
    "hired": Row("hired(keep=0.4)"),
    "visionzip": Row("visionzip(keep=4, contextual=0.5)"),
    "prumerge": Row("prumerge(plus=True, num_top=2, stride=5)"),
    "vispruner": Row("vispruner(keep=4, step=3)"),
    "fastv": Row("fastv(keep=4)"),
    "pyramiddrop": Row("pyramiddrop"),
    "sparsevlm": Row("sparsevlm(layers=(1, 2), table=(300, 110))"),
    "fitprune": Row("fitprune"),
    "dart": Row("dart(keep=7, pivots=2, text_pivots=3)"),
    "v2drop": Row("v2drop"),
    "dyvte": Row("dyvte"),
    "vscan": Row("vscan(keep=0.5, window=2, second=0.5)"),
    "tome": Row("tome(keep=6)", refused=WHOLE_TOWERS),
    "tome-post": Row("tome-post(keep=4)"),
    "evit": Row("evit(keep=5)", refused=WHOLE_TOWERS),
    "ats": Row("ats(num_samples=8)", refused=WHOLE_TOWERS),
    "flowcut": Row("flowcut(keep=5)", refused={**WHOLE_TOWERS, "llava_onevision": "no class token"}),
    "look-m": Row("look-m(hh_ratio=0.5)", after_prompt=True),
    "vl-cache": Row("vl-cache(alpha=0.3)", after_prompt=True),
    "shortv": Row("shortv(layers=(1, 2))"),
    "naavit": Row("naavit(vv='self')"),
    "yopo": Row("yopo(window=3, heads={1: [0], 2: []}, layer_cut=3)"),
    "pbs": Row("pbs(threshold=0.3, block=2, segment=4)"),
    "a-shape": Row("a-shape(sink=2, window=4, last_rows=3)"),
    "divprune": Row("divprune(keep=4)"),
    "cdpruner": Row("cdpruner(keep=4)"),
    "holov": Row("holov(keep=4, chunks=2)"),
    "scope": Row("scope(keep=4)"),
    "mmtok": Row("mmtok(keep=4, words='tokens')"),
    "vmtc": Row("vmtc(keep=4, primary=0.5)"),
    "pool": Row("pool(keep=4)"),
    "tvc": Row("tvc(trigger='every', every=2, bridge=(20, 21), pooling=2, max_injections=1)", after_prompt=True),
    "decoding-identity": Row("decoding-identity", changes=False),
    "vcd": Row("vcd(beta=0.0)"),
    "m3id": Row("m3id(lam=0.5, beta=0.0)"),
    "ritual": Row("ritual(beta=0.0)"),
    "icd": Row("icd(disturbance=[11, 12, 13], vcd_alpha=0.5, beta=0.0)"),
    "lqcd": Row("lqcd(neutralise=False, leading=[11, 12], beta=0.0)"),
    "inter": Row("inter(k=0, answer_prefix=1)"),
    # Settings that drop tokens would leave -inf: these two run, and find nothing to drop.
    "apc-only": Row("apc-only(beta=1e-30)", changes=False),
    "olm": Row("olm(yes=11, no=12)", changes=False),
    "temperature": Row("temperature(of='ritual(beta=0.0)')"),
    "equal-branch": Row("equal-branch(of='ritual(beta=0.0)')"),
    "sign-flip": Row("sign-flip(of='vcd(beta=0.0)')"),
    "placebo-image": Row("placebo-image(of='vcd(beta=0.0)')"),
    "pba": Row("pba(suffix=[11, 12])"),
    "yes-offset": Row("yes-offset(yes=11, offset=2.0)"),
    "damro": Row("damro(topk=3, beta=0.0)"),
    "vdd": Row("vdd(beta=0.0)"),
    "avisc": Row("avisc(lam=0.5, beta=0.0)"),
    "mod": Row("mod(beta=0.0)"),
    "agla": Row("agla(relevance='attention', similarity=1.0, beta=0.0)"),
    # So steep a divergence is next to nothing, and drops nothing.
    "code": Row("code(power=20.0, instruction=(20, 21, 22), max_description=3)"),
    "causalmm": Row(
        "causalmm(vision='uniform', language='reverse', layers=(1, 2), beta=0.0)",
    ),
    "sid": Row("sid(num_keep=3, beta=0.0)"),
    "pai-guidance": Row("pai-guidance(gamma=1.5, beta=0.0)"),
    "deco": Row("deco(threshold_top_p=1.0, threshold_top_k=0)"),
    "dola": Row("dola(layers=(0, 1, 2), beta=0.0)"),
    "revisit": Row("revisit(beta=0.0)"),
    "only": Row("only(beta=0.0)"),
    "mvp": answering("mvp"),
    "carve": answering("carve(read_layers=(1, 2), max_new_tokens=3)"),
    "vicrop-rel": answering("vicrop-rel(layer=1, base_size=20)"),
    "vicrop-grad": answering("vicrop-grad(layer=1, base_size=20)"),
    "vicrop-pure-grad": answering("vicrop-pure-grad(base_size=20)"),
    "api": answering("api(layer=1, max_new_tokens=3)"),
    "api-clip": answering("api-clip", files=tiny_clip),
    "attwarp": answering("attwarp(layer=1, max_new_tokens=3, chain=2)"),
    "fgvp": answering("fgvp(map='vicrop-rel(layer=1, base_size=20)')"),
    "refine": answering("refine(map='vicrop-grad(layer=1, base_size=20)', operator='api(layer=1)')"),
    "vl-sam": answering("vl-sam(max_new_tokens=3)"),
    "controlmllm": answering("controlmllm(read_layers=(1, 2))", region=REGION),
    "zoomeye": answering("zoomeye(side=20, cues='question', words=('Y', 'N'), max_depth=1)"),
    "same-image-twice": answering("same-image-twice"),
    "budget-matched": answering("budget-matched", refused=ONE_RESOLUTION),
    "centre-crop": answering("centre-crop"),
    "random-crop": answering("random-crop"),
    "oracle-crop": answering("oracle-crop", region=REGION),
    "opera": Row("opera(num_attn_candidates=3)", after_prompt=True, modes=NOT_BEAMS),
}
