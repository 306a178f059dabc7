"""What decoding methods see of the decoder at every step, against full forwards without cache."""

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
from lmmhooks.methods.decoding.base import Branch, DecodingMethod
from lmmhooks.methods.decoding.view import StepView
from tests.reference.attention import full_logits
from tests.zoo import FAMILIES, IMAGE, build

# float32 through four layers in other batches; largest difference seen is 8e-6 on states of about 3.
TOLERANCE = 5e-5
STEPS = 3
DEPTH = 4


@dataclass(frozen=True)
class Looking(DecodingMethod):
    """Notes what it sees; optionally beside a branch of another length."""

    id: ClassVar[str] = "test-looking"

    beta: float = 0.0
    branch: bool = False
    attention: tuple[int, ...] = ()
    seen: list[StepView] = field(default_factory=list, compare=False)
    said: list[Tensor] = field(default_factory=list, compare=False)

    def branches(self, family: Any) -> list[Branch]:
        return [Branch("text", image="none")] if self.branch else []

    def weights(self, main: Tensor, others: Sequence[Tensor], step: int, view: StepView) -> Sequence[float]:
        return [1.0, 0.0]

    def reads(self, family: Any) -> Sequence[int]:
        return (0, 2, family.num_layers)

    def reads_image(self, family: Any) -> Sequence[int]:
        return (1, family.num_layers)

    def reads_attention(self, family: Any) -> Sequence[int]:
        return self.attention

    def combine(self, main: Tensor, others: Sequence[Tensor], step: int, view: StepView) -> Tensor:
        self.seen.append(view)
        self.said.append(main)
        return super().combine(main, others, step, view)


def states_of(zoo: Any, inputs: dict[str, Tensor], answer: Tensor) -> dict[int, Tensor]:
    """Inputs of all layers and output of the final norm ``[B, N, D]``, in a forward without cache."""
    family = resolve(zoo.model)
    found: dict[int, Tensor] = {}

    def note(layer: int) -> Any:
        return lambda module, args, kwargs: found.update({layer: args[0] if args else kwargs["hidden_states"]})

    hooks = [
        module.register_forward_pre_hook(note(layer), with_kwargs=True) for layer, module in enumerate(family.layers)
    ]
    hooks.append(family.norm.register_forward_hook(lambda module, args, output: found.update({DEPTH: output})))
    try:
        full_logits(zoo.model, inputs, answer)
    finally:
        for hook in hooks:
            hook.remove()
    return found


@pytest.mark.parametrize("branch", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_states_at_the_newest_token_and_at_the_image_are_those_of_a_forward_without_cache(name, branch):
    zoo = build(name)
    inputs = zoo.inputs(batch=2, images=[2, 1])
    method = Looking(branch=branch)
    with lmmhooks.wrap(zoo.model, method):
        out = zoo.model.generate(**inputs, max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False)
    answer = out[:, inputs["input_ids"].shape[1] :]
    visual = inputs["input_ids"] == IMAGE
    assert len(method.seen) == STEPS
    for step, view in enumerate(method.seen):
        expected = states_of(zoo, inputs, answer[:, :step])
        for layer in (0, 2, DEPTH):
            torch.testing.assert_close(view.states[layer], expected[layer][:, -1], atol=TOLERANCE, rtol=0)
        prompt = states_of(zoo, inputs, answer[:, :0])
        for layer in (1, DEPTH):
            assert torch.equal(view.is_visual[layer].sum(dim=1), visual.sum(dim=1))
            for row in range(2):
                own = view.visual[layer][row, view.is_visual[layer][row]]
                torch.testing.assert_close(own, prompt[layer][row, visual[row]], atol=TOLERANCE, rtol=0)


def test_the_head_makes_of_the_last_states_what_the_model_says():
    zoo = build("qwen2_5_vl")
    method = Looking()
    with lmmhooks.wrap(zoo.model, method):
        zoo.model.generate(**zoo.inputs(batch=2), max_new_tokens=2, do_sample=False)
    for view, said in zip(method.seen, method.said, strict=True):
        logits = view.early_logits([2, DEPTH], normed=True)
        torch.testing.assert_close(logits[1], said, atol=TOLERANCE, rtol=0)
        normed = view.family.norm(view.states[2])
        torch.testing.assert_close(logits[0], view.family.lm_head(normed), atol=TOLERANCE, rtol=0)
        plain = view.early_logits([2], normed=False)[0]
        torch.testing.assert_close(plain, view.family.lm_head(view.states[2]), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("branch", [False, True])
@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "internvl"])
def test_attention_of_the_newest_token_at_prefill_and_at_every_step(name, branch):
    zoo, eager = build(name), build(name, attn="eager")
    inputs = zoo.inputs(batch=2)
    method = Looking(branch=branch, attention=(1,))
    with lmmhooks.wrap(zoo.model, method):
        out = zoo.model.generate(**inputs, max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False)
    answer = out[:, inputs["input_ids"].shape[1] :]
    for step, view in enumerate(method.seen):
        seen: list[Tensor] = []
        attention = resolve(eager.model).attention_of(resolve(eager.model).layers[1])
        hook = attention.register_forward_hook(lambda module, args, output, seen=seen: seen.append(output[1]))
        full_logits(eager.model, inputs, answer[:, :step])
        hook.remove()
        row = view.rows[1]
        length = inputs["input_ids"].shape[1] + step
        # A shorter branch is padded on the left, the main rows with it where they are shorter than it.
        weights = row.weights[..., -length:]
        torch.testing.assert_close(weights, seen[0][:, :, -1], atol=TOLERANCE, rtol=0)
        assert row.layout.length == row.weights.shape[-1] == row.value.shape[2]
        torch.testing.assert_close(row.weights.sum(dim=-1), torch.ones_like(row.weights[..., 0]))


def test_what_is_kept_per_row_goes_with_its_beam():
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)

    @dataclass(frozen=True)
    class Keeping(Looking):
        id: ClassVar[str] = "test-keeping"

        def combine(self, main: Tensor, others: Sequence[Tensor], step: int, view: StepView) -> Tensor:
            # The sum of what was said on the way here, by row.
            view.memory["sum"] = view.memory.get("sum", 0) + main[:, :5]
            view.memory.setdefault("first", main[:, :5].clone())
            self.seen.append(view)
            self.said.append(view.memory["sum"].clone())
            return super().combine(main, others, step, view)

        def select_rows(self, rows: Tensor, memory: dict[Any, Any]) -> None:
            memory.update({name: value.index_select(0, rows) for name, value in memory.items()})

    method = Keeping(branch=True)
    with lmmhooks.wrap(zoo.model, method):
        out = zoo.model.generate(
            **inputs, max_new_tokens=STEPS, min_new_tokens=STEPS, num_beams=3, do_sample=False, num_return_sequences=3
        )
    assert out.shape[0] == 6
    # Beams of one prompt share its first logits and its image, whichever beam they came from.
    last = method.seen[-1]
    for prompt in range(2):
        rows = slice(3 * prompt, 3 * prompt + 3)
        torch.testing.assert_close(last.memory["first"][rows], last.memory["first"][3 * prompt].expand(3, -1))
        own = last.visual[1][rows]
        torch.testing.assert_close(own, own[:1].expand_as(own), atol=TOLERANCE, rtol=0)
    assert not torch.allclose(last.memory["first"][0], last.memory["first"][3])
    assert not torch.allclose(last.visual[1][0], last.visual[1][3])


def test_nothing_is_hooked_for_a_method_that_reads_nothing():
    zoo = build("llava")
    with lmmhooks.wrap(zoo.model, "vcd") as patch:
        assert not any("(read)" in entry for entry in patch.attached)


@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
@pytest.mark.parametrize("reducer", ["fastervlm(keep=4)", "fastv(keep=4)"])
def test_image_states_behind_a_reduction_are_those_of_the_tokens_that_are_left(name, reducer):
    """Layers before the cut show all tokens; the final norm shows the whole prompt again, of which the rest is gone."""
    zoo = build(name)
    inputs = zoo.inputs(batch=2)
    seen: dict[int, Tensor] = {}
    normed = resolve(zoo.model).norm
    method = Looking()
    with lmmhooks.wrap(zoo.model, reducer, method) as patch:
        hook = normed.register_forward_hook(lambda module, args, output: seen.setdefault(DEPTH, output))
        zoo.model.generate(**inputs, max_new_tokens=1, do_sample=False)
        hook.remove()
        last = patch._runtime.last.stages[-1]
    (view,) = method.seen
    first = 4 if reducer.startswith("fastervlm") else int((inputs["input_ids"][1] == IMAGE).sum())
    assert int(view.is_visual[1][1].sum()) == first
    for row in range(2):
        assert view.is_visual[DEPTH][row].sum() == 4
        left = last.index[row, last.layout.visual[row]]
        kept = view.visual[DEPTH][row, view.is_visual[DEPTH][row]]
        positions = left if seen[DEPTH].shape[1] == inputs["input_ids"].shape[1] else last.layout.visual[row].nonzero()
        assert torch.equal(kept, seen[DEPTH][row, positions.flatten()])


def test_attention_is_read_among_more_rows_than_one_block_holds(monkeypatch):
    from lmmhooks.engines import editing

    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    seen = []
    for block in (editing.ROW_BLOCK, 3):
        monkeypatch.setattr(editing, "ROW_BLOCK", block)
        method = Looking(attention=(1,))
        with lmmhooks.wrap(zoo.model, "vaf(enh=1.0, sup=0.5)", method):
            zoo.model.generate(**inputs, max_new_tokens=1, do_sample=False)
        seen.append(method.seen[0].rows[1].weights)
    torch.testing.assert_close(*seen)


def test_several_new_tokens_at_once_each_see_what_was_there_before_them():
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    new = torch.tensor([[9, 10, 11], [12, 13, 14]])
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(new)], dim=1)
    length = mask.shape[1] - 3
    together, apart = Looking(attention=(1,)), Looking(attention=(1,))
    with torch.no_grad():
        with lmmhooks.wrap(zoo.model, together):
            cache = zoo.model(**inputs).past_key_values
            zoo.model(input_ids=new, past_key_values=cache, attention_mask=mask, logits_to_keep=3)
        with lmmhooks.wrap(zoo.model, apart):
            cache = zoo.model(**inputs).past_key_values
            for step, token in enumerate(new.split(1, dim=1)):
                zoo.model(input_ids=token, past_key_values=cache, attention_mask=mask[:, : length + step + 1])
    assert len(together.seen) == len(apart.seen) == 4
    for one, other in zip(together.seen, apart.seen, strict=True):
        torch.testing.assert_close(one.states[2], other.states[2], atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(one.rows[1].weights, other.rows[1].weights, atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(one.rows[1].value, other.rows[1].value, atol=TOLERANCE, rtol=0)
        assert torch.equal(one.rows[1].layout.segment, other.rows[1].layout.segment)


def test_the_prompt_is_read_at_its_last_token():
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    with torch.no_grad(), lmmhooks.wrap(zoo.model, Looking(attention=(1,))):
        assert zoo.model(**inputs).logits.shape[1] == 1
        with pytest.raises(PromptError, match="logits_to_keep=3"):
            zoo.model(**inputs, logits_to_keep=3)
    with torch.no_grad(), lmmhooks.wrap(zoo.model, Looking()):
        assert zoo.model(**inputs, logits_to_keep=3).logits.shape[1] == 3
        with pytest.raises(PromptError, match="does not read the decoder"):
            zoo.model(**inputs, logits_to_keep=torch.tensor([0, 1]))


def test_branches_that_catch_up_are_not_what_is_seen():
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)

    @dataclass(frozen=True)
    class Lazily(Looking):
        id: ClassVar[str] = "test-lazily"
        beta: float = 1e-30  # so low that it decides nothing: branches catch up at every step

    seen = []
    for lazy in (False, True):
        method = Lazily(branch=True, lazy=lazy, attention=(1,))
        with lmmhooks.wrap(zoo.model, method):
            zoo.model.generate(**inputs, max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False)
        seen.append(method.seen)
    for eager, late in zip(*seen, strict=True):
        for layer in (0, 2, DEPTH):
            torch.testing.assert_close(eager.states[layer], late.states[layer], atol=TOLERANCE, rtol=0)
        length = late.rows[1].weights.shape[-1]
        torch.testing.assert_close(eager.rows[1].weights[..., -length:], late.rows[1].weights, atol=TOLERANCE, rtol=0)


def test_what_a_step_showed_is_let_go():
    zoo = build("llava")
    with lmmhooks.wrap(zoo.model, Looking(attention=(1,))) as patch:
        zoo.model.generate(**zoo.inputs(), max_new_tokens=2, do_sample=False)
        (hook,) = [h for h in zoo.model._forward_hooks.values() if getattr(h, "__name__", "") == "_leave"]
        now = hook.__self__.reader._now
    assert not now.states
    assert not now.rows
    assert patch.attached == []


def test_steered_states_are_seen_as_the_head_reads_them():
    zoo = build("llava")
    method = Looking()
    with lmmhooks.wrap(zoo.model, "vista(lam=0.5)", method) as patch:
        zoo.model.generate(**zoo.inputs(batch=2), max_new_tokens=2, do_sample=False)
        for view, said in zip(method.seen, method.said, strict=True):
            torch.testing.assert_close(patch.family.lm_head(view.states[DEPTH]), said, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("press", ["look-m(hh_ratio=0.5)", "vl-cache(alpha=0.3)"])
def test_attention_to_a_compressed_prompt_is_not_read(press):
    zoo = build("llava")
    with pytest.raises(MethodError, match="edits or reads the attention that answers pay"):
        lmmhooks.wrap(zoo.model, press, Looking(attention=(1,)))
    with lmmhooks.wrap(zoo.model, press, Looking()):
        zoo.model.generate(**zoo.inputs(), max_new_tokens=2, do_sample=False)
