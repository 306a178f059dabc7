"""Branches that show something else in an image's place, read after the main rows, or attend in their own way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import lmmhooks
from lmmhooks.errors import MethodError, PromptError
from lmmhooks.family import resolve
from lmmhooks.methods.decoding.avisc import Avisc
from lmmhooks.methods.decoding.base import Branch, DecodingMethod
from lmmhooks.methods.decoding.mod import Mod
from lmmhooks.methods.decoding.sid import Sid
from lmmhooks.methods.decoding.view import BranchAttention, ImageView, StepView
from lmmhooks.methods.probe import Probe
from tests.methods.shown import SILENT
from tests.reference.attention import full_logits
from tests.reference.branch_features import image_runs, of_image, prompt_attention
from tests.zoo import FAMILIES, IMAGE, build

# float32 through four layers in other batches, times weights that reach 2; largest difference seen is 1e-5.
TOLERANCE = 5e-5
STEPS = 4


@dataclass(frozen=True)
class Shown(DecodingMethod):
    """Shows what its images are asked for, and notes what it was told."""

    id: ClassVar[str] = "test-shown"

    beta: float = 0.0
    image: str = "features"
    after_main: bool = False
    factor: float = 1.0
    ids: tuple[int, ...] = ()
    wrong: bool = False
    seed: int = 0
    seen: list[tuple[tuple[Tensor, ...], ImageView]] = field(default_factory=list, compare=False)

    def branches(self, family: Any) -> list[Branch]:
        return [Branch("other", image=self.image, after_main=self.after_main)]

    def reads_prompt(self, family: Any) -> Sequence[int]:
        return (3, 0) if self.after_main else ()

    def probes(self, family: Any) -> Sequence[Probe]:
        return [Probe("vision_states", 1)] if family.projects_patches else []

    def weights(self, main: Tensor, others: Sequence[Tensor], step: int, view: StepView) -> Sequence[float]:
        return [2.0, -1.0]

    def transform_features(self, features: tuple[Tensor, ...], branch: Branch, image: ImageView) -> tuple[Tensor, ...]:
        self.seen.append((features, image))
        if self.wrong:
            return tuple(tensor[1:] for tensor in features)
        return tuple(self.factor * tensor for tensor in features)

    def replace_image(
        self, features: tuple[Tensor, ...], branch: Branch, image: ImageView
    ) -> tuple[Tensor, ...] | Tensor:
        self.seen.append((features, image))
        if self.ids:
            return torch.tensor(self.ids)
        return tuple(tensor[:0] if self.wrong else self.factor * tensor for tensor in features)


def answered(zoo: Any, inputs: dict[str, Tensor], *methods: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """New tokens, and logits ``[B, t, vocabulary]``."""
    arguments = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False, "suppress_tokens": SILENT}
    with lmmhooks.wrap(zoo.model, *methods):
        out = zoo.model.generate(**inputs, output_logits=True, return_dict_in_generate=True, **{**arguments, **kwargs})
    return out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.logits, dim=1)


@pytest.mark.parametrize("after_main", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_features_that_stay_what_they_are_change_nothing(name, after_main):
    zoo = build(name)
    inputs = zoo.inputs(batch=2, images=[2, 1])
    method = Shown(after_main=after_main)
    tokens, logits = answered(zoo, inputs, method)
    plain_tokens, plain = answered(zoo, inputs, "decoding-identity")
    torch.testing.assert_close(logits, plain, atol=TOLERANCE, rtol=0)
    assert torch.equal(tokens, plain_tokens)
    assert len(method.seen) == 3, "one call per image"
    _, other = answered(zoo, inputs, Shown(factor=0.5, after_main=after_main))
    assert (other - plain).abs().max() > 1e-2


@pytest.mark.parametrize("name", FAMILIES)
def test_a_method_is_told_of_every_image(name):
    zoo, eager = build(name), build(name, attn="eager")
    inputs = zoo.inputs(batch=2, images=[2, 1])
    method = Shown(after_main=True)
    with torch.no_grad(), lmmhooks.wrap(zoo.model, method):
        zoo.model(**inputs, logits_to_keep=1)
    attention = prompt_attention(eager.model, inputs)[[3, 0]]
    runs = [
        (row, run)
        for row in range(2)
        for run in image_runs(inputs["input_ids"][row], inputs["attention_mask"][row], IMAGE)
    ]
    for (row, run), (features, view) in zip(runs, method.seen, strict=True):
        assert len(run) == len(view.tokens) == len(features[0])
        expected = of_image(attention, inputs["attention_mask"], row, run)
        torch.testing.assert_close(view.attention, expected, atol=1e-5, rtol=0)
        assert torch.equal(view.prompt, inputs["input_ids"][row][inputs["attention_mask"][row].bool()])
        assert len(features) == (3 if name == "qwen3_vl" else 1)
    draws = [view.generator().initial_seed() for _, view in method.seen]
    assert len(set(draws)) == 3
    alone = Shown(after_main=True)
    with torch.no_grad(), lmmhooks.wrap(zoo.model, alone):
        zoo.model(**zoo.row(inputs, 1), logits_to_keep=1)
    assert alone.seen[0][1].generator().initial_seed() == draws[2]


@pytest.mark.parametrize("name", ["llava", "llava_next"])
def test_readings_of_the_tower_lie_at_their_tokens(name):
    zoo = build(name)
    inputs = zoo.inputs(batch=2, images=[2, 1])
    method = Shown()
    with torch.no_grad(), lmmhooks.wrap(zoo.model, method):
        zoo.model(**inputs)
        projector = zoo.model.model.multi_modal_projector
        for features, view in method.seen:
            (states,) = view.readings.values()
            placed = view.tokens.crop >= 0
            torch.testing.assert_close(projector(states[placed]), features[0][placed], atol=1e-5, rtol=0)
            assert states[~placed].isnan().all()


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl", "internvl"])
def test_text_in_an_image_s_place_is_a_prompt_of_text(name):
    zoo = build(name)
    inputs = zoo.inputs(batch=2, images=[2, 1])
    ids = (50, 60, 70)
    answer, logits = answered(zoo, inputs, Shown(image="replaced", ids=ids))
    plain = full_logits(zoo.model, inputs, answer[:, :-1])[:, -STEPS:]
    gone = resolve(zoo.model).visual_ids
    for row in range(2):
        prompt = inputs["input_ids"][row][inputs["attention_mask"][row].bool()].tolist()
        runs = image_runs(inputs["input_ids"][row], inputs["attention_mask"][row], IMAGE)
        text = []
        for number, token in enumerate(prompt):
            text += list(ids) if any(number == run[0] for run in runs) else []
            text += [] if token in gone else [token]
        tokens = torch.tensor([text])
        with torch.no_grad():
            full = torch.cat([tokens, answer[row : row + 1, :-1]], dim=1)
            other = zoo.model(input_ids=full, attention_mask=torch.ones_like(full)).logits[0, -STEPS:]
        torch.testing.assert_close(logits[row], 2 * plain[row] - other, atol=TOLERANCE, rtol=0)


# -- branches that read after the main rows --------------------------------------------------------------------------


@pytest.mark.parametrize("method", [Avisc(lam=0.5, beta=0.0), Mod(beta=0.0)], ids=lambda method: method.id)
def test_one_forward_per_step_once_the_prompt_was_read(method):
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    rows = []
    decoder = zoo.model.model.language_model
    hook = decoder.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["inputs_embeds"])), with_kwargs=True
    )
    try:
        answered(zoo, inputs, method)
    finally:
        hook.remove()
    assert rows == [2, 2, *[4] * (STEPS - 1)]


@pytest.mark.parametrize("below", ["var(sink_dims='any', tau=2.6, rho=0.3)", "fastervlm(keep=4)", "fastv(keep=4)"])
@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_beside_other_methods_branches_keep_a_forward_of_their_own(name, below):
    """With features that stay what they are, the branch is the main reading under the other method."""
    zoo = build(name)
    inputs = zoo.inputs(batch=2, images=[2, 1])
    _, logits = answered(zoo, inputs, below, Shown(after_main=True))
    _, plain = answered(zoo, inputs, below)
    torch.testing.assert_close(logits, plain, atol=TOLERANCE, rtol=0)


def test_rows_that_have_joined_are_counted_like_any():
    zoo = build("llava")
    inputs = zoo.inputs(batch=2, text=4)
    found = []
    for method in (Shown(), Shown(after_main=True)):
        with lmmhooks.wrap(zoo.model, method) as patch, torch.no_grad():
            zoo.model(**inputs)
            found.append(patch.stats)
    assert found[1].kv_bytes == 2 * found[1].kv_bytes_full > 0
    assert found[1].prefill_flops == pytest.approx(2 * found[1].prefill_flops_full)
    assert found[0].layers == found[1].layers


def test_attention_to_tokens_that_have_left_is_zero():
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    method = Shown(after_main=True)
    with torch.no_grad(), lmmhooks.wrap(zoo.model, "fastv(keep=4)", method):
        zoo.model(**inputs, logits_to_keep=1)
    for _, view in method.seen:
        late, early = view.attention
        assert int((late > 0).sum()) == 4
        assert bool((early > 0).all())


@pytest.mark.parametrize("method", [Avisc(lam=0.5), Sid(num_keep=2)], ids=lambda method: method.id)
def test_drafts_that_come_with_the_prompt_hide_its_last_token(method):
    zoo = build("llava")
    inputs = zoo.inputs(text=8)
    inputs["input_ids"][:, -4:] = inputs["input_ids"][:, -8:-4]
    with lmmhooks.wrap(zoo.model, method), pytest.raises(PromptError, match="last token of the prompt"):
        zoo.model.generate(**inputs, max_new_tokens=10, do_sample=False, prompt_lookup_num_tokens=3)


def test_rows_that_have_joined_are_cropped_like_any():
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    with torch.no_grad(), lmmhooks.wrap(zoo.model, Avisc(lam=0.5, beta=0.0)):
        out = zoo.model(**inputs, logits_to_keep=1)
        cache, tokens = out.past_key_values, torch.tensor([[20, 30, 40], [50, 60, 70]])
        several = zoo.model(input_ids=tokens, past_key_values=cache).logits
        cache.crop(-2)
        again = zoo.model(input_ids=tokens[:, 1:2], past_key_values=cache).logits
    torch.testing.assert_close(again[:, 0], several[:, 1], atol=TOLERANCE, rtol=0)


def test_without_cache_branches_read_after_the_main_rows_at_every_step():
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    method = Shown(after_main=True, factor=0.5)
    cached = answered(zoo, inputs, method)
    uncached = answered(zoo, inputs, method, use_cache=False)
    for one, other in zip(cached, uncached, strict=True):
        torch.testing.assert_close(one, other, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    "method", [Shown(after_main=True, factor=0.5), Avisc(beta=1e-30, lazy=True)], ids=["joined", "lazy"]
)
@pytest.mark.parametrize("below", [[], ["var(sink_dims='any')"]], ids=["alone", "beside"])
def test_positions_of_the_main_rows_are_their_own_in_a_loop_of_plain_forwards(method, below):
    """A model with axes remembers one offset; branches that are read in between must not leave theirs."""
    zoo = build("qwen2_5_vl")
    inputs = zoo.inputs(batch=2, images=[2, 1])
    answer, logits = answered(zoo, inputs, *below, method)
    with torch.no_grad(), lmmhooks.wrap(zoo.model, *below, method):
        out = zoo.model(**inputs, logits_to_keep=1)
        said = [out.logits[:, -1]]
        for token in answer[:, :-1].split(1, dim=1):
            zoo.model.model.rope_deltas = torch.full((2, 1), 1000)
            mask = torch.nn.functional.pad(inputs["attention_mask"], (0, len(said)), value=1)
            out = zoo.model(input_ids=token, attention_mask=mask, past_key_values=out.past_key_values)
            said.append(out.logits[:, -1])
    torch.testing.assert_close(torch.stack(said, dim=1), logits, atol=TOLERANCE, rtol=0)


# -- attention of branches -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attending(DecodingMethod):
    """Attends as the model does, said in full."""

    id: ClassVar[str] = "test-attending"

    beta: float = 0.0
    by_hand: bool = True
    seen: list[BranchAttention] = field(default_factory=list, compare=False)

    def branches(self, family: Any) -> list[Branch]:
        return [Branch("text", image="none"), Branch("copy")]

    def branch_layers(self, family: Any) -> Sequence[int]:
        return (1, 2)

    def weights(self, main: Tensor, others: Sequence[Tensor], step: int, view: StepView) -> Sequence[float]:
        return [2.0, 0.0, -1.0]

    def attend(self, call: BranchAttention, branch: Branch) -> Tensor | None:
        if branch.name == "text":
            return 0 * call.plain()
        self.seen.append(call)
        if not self.by_hand:
            return call.plain()
        rows = torch.arange(call.query.shape[2]).expand(len(call.query), -1)
        weights = call.weights_of(rows)
        return weights @ call.value.repeat_interleave(weights.shape[1] // call.value.shape[1], dim=1)


@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "internvl"])
def test_a_branch_that_attends_as_the_model_does_is_the_main_one(name, by_hand):
    zoo = build(name)
    inputs = zoo.inputs(batch=2, images=[2, 1])
    method = Attending(by_hand=by_hand)
    _, logits = answered(zoo, inputs, method)
    _, plain = answered(zoo, inputs, "decoding-identity")
    torch.testing.assert_close(logits, plain, atol=TOLERANCE, rtol=0)
    length = inputs["input_ids"].shape[1]
    prefill, *steps = method.seen[::2]
    assert prefill.is_prefill
    assert [call.layout.length for call in steps] == [length + step for step in range(1, STEPS)]
    assert {call.prompt_length for call in method.seen} == {length}
    assert {len(call.query) for call in method.seen} == {2}


def test_what_a_branch_hides_is_hidden_from_nobody_else():
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    seen: list[Tensor] = []
    with lmmhooks.wrap(zoo.model, "decoding-identity"):
        plain = answered_states(zoo, inputs)
    with lmmhooks.wrap(zoo.model, Sid(num_keep=1, beta=0.0)):
        stacked = answered_states(zoo, inputs)
    for layer, (one, two) in enumerate(zip(plain, stacked, strict=True)):
        main, branch = two.chunk(2)
        torch.testing.assert_close(main, one, atol=TOLERANCE, rtol=0)
        same = torch.allclose(branch, one, atol=TOLERANCE, rtol=0)
        assert same == (layer < 2), "layers before the first with hidden keys are those of the main rows"
    assert not seen


def answered_states(zoo: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Output of every decoder layer for all rows."""
    states: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda module, args, output: states.append(output))
        for layer in zoo.model.model.language_model.layers
    ]
    try:
        with torch.no_grad():
            zoo.model(**inputs, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return states


# -- composition -----------------------------------------------------------------------------------------------------

METHODS = (
    "damro(topk=3, beta=0.0)",
    "vdd(beta=0.0)",
    "avisc(lam=0.5, beta=0.0)",
    "mod(beta=0.0)",
    "causalmm(vision='shuffle', language='reverse', layers=(1, 2), beta=0.0)",
    "sid(num_keep=2, beta=0.0)",
    "agla(relevance='attention', similarity=1.0, beta=0.0)",
    "code(power=20.0, instruction=(20, 21, 22), max_description=3)",
)


@pytest.mark.parametrize("below", ["fastervlm(keep=4)", "var(sink_dims='any', tau=2.6, rho=0.3)"])
@pytest.mark.parametrize("spec", METHODS)
def test_rows_equal_single_prompts_beside_other_methods(spec, below):
    zoo = build("llava")
    inputs = zoo.inputs(batch=2, images=[2, 1])
    tokens, logits = answered(zoo, inputs, below, spec)
    _, without = answered(zoo, inputs, below)
    assert (logits - without)[:, 0].abs().max() > 1e-3
    for row in range(2):
        one, alone = answered(zoo, zoo.row(inputs, row), below, spec)
        assert torch.equal(tokens[row : row + 1], one)
        # Logits of about 5, times weights that sum to 5 with mod.
        torch.testing.assert_close(logits[row : row + 1], alone, atol=2e-4, rtol=0)


def test_methods_that_read_the_tower_refuse_one_with_fewer_patches():
    zoo = build("llava")
    for spec in METHODS:
        if spec.startswith(("damro", "causalmm")):
            with pytest.raises(MethodError, match="reads all patches of the vision tower"):
                lmmhooks.wrap(zoo.model, "tome(keep=6)", spec)


# -- refusals --------------------------------------------------------------------------------------------------------


def test_images_are_needed_where_they_are_shown_otherwise():
    zoo = build("llava")
    mixed = zoo.inputs(batch=2, images=(1, 0))
    for method in (Shown(), Shown(image="replaced", ids=(9,)), Shown(after_main=True)):
        with lmmhooks.wrap(zoo.model, method), pytest.raises(PromptError, match="row 1 of 2 has none"):
            zoo.model(**mixed, logits_to_keep=1)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Shown(wrong=True), "its number of tokens"),
        (Shown(image="replaced", wrong=True), "at least one"),
        (Shown(image="replaced", ids=(9, IMAGE)), "none of which stands for an image"),
    ],
)
def test_what_cannot_stand_in_an_images_place_is_refused(method, message):
    zoo = build("llava")
    with lmmhooks.wrap(zoo.model, method), pytest.raises(MethodError, match=message):
        zoo.model(**zoo.inputs(), logits_to_keep=1)


def test_an_image_half_masked_away_is_refused_and_one_masked_away_is_not_shown():
    zoo = build("llava")
    inputs = zoo.inputs(images=2)
    place = (inputs["input_ids"][0] == IMAGE).nonzero().flatten()
    half = {**inputs, "attention_mask": inputs["attention_mask"].clone()}
    half["attention_mask"][0, place[:3]] = 0
    with torch.no_grad(), lmmhooks.wrap(zoo.model, Shown()), pytest.raises(PromptError, match="mask whole images"):
        zoo.model(**half, logits_to_keep=1)
    whole = {**inputs, "attention_mask": inputs["attention_mask"].clone()}
    whole["attention_mask"][0, place[:16]] = 0
    whole["position_ids"] = (whole["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    method = Shown()
    with torch.no_grad():
        plain = zoo.model(**whole, logits_to_keep=1).logits
        with lmmhooks.wrap(zoo.model, method):
            same = zoo.model(**whole, logits_to_keep=1).logits
    torch.testing.assert_close(same, plain, atol=TOLERANCE, rtol=0)
    assert len(method.seen) == 1


def test_branches_that_contradict_themselves():
    with pytest.raises(ValueError, match="cannot be edited"):
        Branch("a", image="replaced", text="edited")
    with pytest.raises(ValueError, match="after_main"):
        Branch("a", image="none", after_main=True)
    with pytest.raises(ValueError, match="image='other'"):
        Branch("a", image="other")
