"""Branches that read only what they do not have in common with the main rows, against branches that read everything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import lmmhooks
from lmmhooks.engines import branch_forwards
from lmmhooks.engines.prefix_sharing import can_share, columns_to_read, prefix_cache
from lmmhooks.methods.decoding.base import Branch, DecodingMethod
from lmmhooks.methods.decoding.context import BranchContext
from lmmhooks.methods.decoding.view import ImageView, StepView
from tests.zoo import FAMILIES, IMAGE, build, images_under_beams

# float32 through four layers, a prompt read in one piece or in two, times weights of 2; largest difference seen: 2e-6.
TOLERANCE = 5e-5
STEPS = 4


@dataclass(frozen=True)
class Longer(DecodingMethod):
    """A branch with two more tokens behind the image, one with its last token changed, and one that reads the same."""

    id: ClassVar[str] = "test-longer"

    def branches(self, family: Any) -> list[Branch]:
        return [Branch("longer", text="edited"), Branch("other end", text="edited"), Branch("copy")]

    def edit_tokens(self, tokens: Tensor, branch: Branch, context: BranchContext) -> Tensor:
        if branch.name == "longer":
            return torch.cat([tokens[:-2], tokens.new_tensor([11, 12]), tokens[-2:]])
        return torch.cat([tokens[:-1], tokens.new_tensor([13])])

    def weights(self, main: Tensor, others: Sequence[Tensor], step: int, view: StepView) -> Sequence[float]:
        return [2.0, -0.75, -0.5, 0.25]


@pytest.fixture
def whole(monkeypatch):
    """Have every branch read its whole prompt."""

    def read_whole():
        monkeypatch.setattr(branch_forwards.SharedPrompt, "of", classmethod(lambda *args: None))

    return read_whole


def answer(zoo, inputs, **kwargs):
    torch.manual_seed(0)
    kwargs = {"max_new_tokens": STEPS, "do_sample": False, **kwargs}
    with lmmhooks.wrap(zoo.model, Longer(beta=0.0)) as patch:
        out = zoo.model.generate(**inputs, **kwargs, output_logits=True, return_dict_in_generate=True)
        return out, patch.stats


def decoder_widths(zoo):
    """Records rows and columns of every forward of the decoder; the hook that does so."""
    seen: list[tuple[int, int]] = []
    hook = zoo.model.model.language_model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple((args[0] if args else kwargs["hidden_states"]).shape[:2])),
        with_kwargs=True,
    )
    return seen, hook


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("images", [(1, 1), (2, 1), (0, 1)])
def test_the_answer_is_that_of_branches_that_read_everything(family, images, whole):
    zoo = build(family)
    inputs = zoo.inputs(batch=2, images=images)
    seen, hook = decoder_widths(zoo)
    shared, stats = answer(zoo, inputs)
    hook.remove()
    length = inputs["input_ids"].shape[1] + 2
    # One width for all; the branches read what comes behind their common part, and then there is one forward per step.
    assert seen == [(2, length), (6, 4), *[(8, 1)] * (STEPS - 1)]
    whole()
    expected, everything = answer(zoo, inputs)
    torch.testing.assert_close(torch.stack(shared.logits), torch.stack(expected.logits), atol=TOLERANCE, rtol=0)
    assert torch.equal(shared.sequences, expected.sequences)
    assert stats.branches == everything.branches == 4
    assert stats.kv_bytes == everything.kv_bytes


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize(
    "mode",
    [{"do_sample": True}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}],
    ids=["sampling", "beams", "lookup"],
)
def test_every_mode_of_generate_goes_on_with_the_joined_cache(family, mode, whole):
    zoo = build(family)
    batch = 1 if "prompt_lookup_num_tokens" in mode else 2
    inputs = zoo.inputs(batch=batch, text=8)
    inputs["input_ids"][:, -4:] = inputs["input_ids"][:, -8:-4]
    if batch == 1:
        # A forward over drafts that come with the prompt asks for several of its positions, which is refused.
        mode = {**mode, "max_new_tokens": 6}
        with pytest.raises(lmmhooks.PromptError, match="only the last one can be combined"):
            answer(zoo, inputs, **mode)
        return
    shared, _ = answer(zoo, inputs, **mode)
    whole()
    expected, _ = answer(zoo, inputs, **mode)
    assert torch.equal(shared.sequences, expected.sequences)


def test_a_loop_of_plain_forwards_goes_on_with_the_joined_cache(whole):
    zoo = build("llava")
    inputs = zoo.inputs(batch=2, padding="right")

    def loop():
        with lmmhooks.wrap(zoo.model, Longer(beta=0.0)), torch.no_grad():
            out = zoo.model(**inputs)
            logits = [out.logits[:, -1]]
            for token in (20, 21, 22):
                out = zoo.model(input_ids=torch.full((2, 1), token), past_key_values=out.past_key_values)
                logits.append(out.logits[:, -1])
        return torch.stack(logits)

    shared = loop()
    whole()
    torch.testing.assert_close(shared, loop(), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("beside", [["fastervlm(keep=4)"], ["var(sink_dims='any', tau=2.6, rho=0.3)"]])
def test_methods_that_act_on_a_prompt_see_it_in_one_piece(beside):
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    seen, hook = decoder_widths(zoo)
    with lmmhooks.wrap(zoo.model, *beside, Longer(beta=0.0)), torch.no_grad():
        zoo.model(**inputs)
    hook.remove()
    assert [rows for rows, _ in seen] == [8]


def test_without_a_cache_there_is_nothing_to_share():
    zoo = build("llava")
    seen, hook = decoder_widths(zoo)
    with lmmhooks.wrap(zoo.model, Longer(beta=0.0)), torch.no_grad():
        zoo.model(**zoo.inputs(batch=2), use_cache=False)
    hook.remove()
    assert [rows for rows, _ in seen] == [8]


@dataclass(frozen=True)
class Shorter(DecodingMethod):
    """A branch without image, one with a word in its place, and one with the first of its visual tokens."""

    id: ClassVar[str] = "test-shorter"
    shown: int = 1

    def branches(self, family: Any) -> list[Branch]:
        words = [Branch("none", image="none"), Branch("word", image="replaced")]
        return [*words, Branch("first", image="replaced")] if self.shown else words

    def replace_image(self, features: tuple[Tensor, ...], branch: Branch, image: ImageView) -> Any:
        if branch.name == "word":
            return torch.tensor([11])
        return tuple(tensor[: self.shown] for tensor in features)

    def weights(self, main: Tensor, others: Sequence[Tensor], step: int, view: StepView) -> Sequence[float]:
        return [2.0, -0.75, -0.5, 0.25][: 1 + len(others)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shown", [0, 1])
@pytest.mark.parametrize("mode", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_branches_without_the_image_are_read_as_wide_as_they_are(family, shown, mode, whole):
    zoo = build(family)
    images = images_under_beams(zoo, 3, 2) if mode else [3, 2]
    inputs = zoo.inputs(batch=2, images=images, text=[2, 4])
    seen, hook = decoder_widths(zoo)

    def run():
        with lmmhooks.wrap(zoo.model, Shorter(beta=0.0, shown=shown)) as patch:
            settings = {"max_new_tokens": STEPS, "do_sample": False, "output_scores": True, **mode}
            out = zoo.model.generate(**inputs, **settings, return_dict_in_generate=True)
            return out, patch.stats.kv_bytes

    out, held = run()
    hook.remove()
    rows, length = seen[0]
    branch_rows, width = seen[1]
    assert branch_rows == rows * (2 + bool(shown))
    assert width <= length // 2
    whole()
    expected, everything = run()
    assert torch.equal(out.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(out.scores), torch.stack(expected.scores), atol=TOLERANCE, rtol=0)
    assert held == everything


def test_lazy_branches_without_the_image_are_not_padded_to_its_length():
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    seen, hook = decoder_widths(zoo)
    with lmmhooks.wrap(zoo.model, Shorter(beta=1e-9, lazy=True)), torch.no_grad():
        zoo.model(**inputs)
    hook.remove()
    text = int((inputs["input_ids"] != IMAGE)[0].sum())
    assert seen == [(2, inputs["input_ids"].shape[1]), (6, text + 1)]


# -- pieces ------------------------------------------------------------------------------------------------------------


def test_the_suffix_begins_where_the_first_branch_parts():
    rows = torch.tensor(
        [
            [0, 0, 1, IMAGE, 20, 21, 22, 23],  # main
            [0, 0, 0, 1, IMAGE, 30, 31, 32],
            [0, 0, 1, IMAGE, 20, 21, 22, 24],  # parts at its last token
            [0, 0, 0, 1, IMAGE, 30, 31, 32],  # does not part: the last token is read again
        ]
    )

    def found(ids):
        return columns_to_read(rows, rows != 0, 2, ids, [True])

    assert found([IMAGE]) == (1, True)
    rows[3] = torch.tensor([0, 0, 1, IMAGE, 30, 40, 31, 32])
    assert found([IMAGE]) == (3, True)
    rows[3] = torch.tensor([0, 0, 0, 1, IMAGE, 30, 30, 32])
    assert found([IMAGE]) == (2, True)
    # An image among what would have to be read.
    rows[3] = torch.tensor([0, 0, 1, 30, 31, 32, 33, IMAGE])
    assert found([IMAGE]) is None
    # More than half.
    rows[3] = torch.tensor([0, 0, 1, 41, 42, 30, 31, 32])
    assert found([]) is None


def test_branches_that_show_something_else_part_at_the_first_image():
    main = [1, IMAGE, IMAGE, IMAGE, IMAGE, IMAGE, 20, 21]
    without, replaced = [0, 0, 0, 0, 0, 1, 20, 21], [0, 0, 0, 0, 1, IMAGE, 20, 21]

    def found(*branches, as_given=False):
        rows = torch.tensor([main, *branches])
        return columns_to_read(rows, rows != 0, 1, [IMAGE], [as_given] * len(branches))

    assert found(without) == (2, True)
    # Its image is another one, whatever stands for it: the whole prompt is read, if that is short.
    assert found(replaced) == (4, False)
    assert found(without, replaced) == (4, False)
    assert found([0, 0, 0, 1, IMAGE, IMAGE, 20, 21]) is None
    assert found(main) is None
    assert found(main, as_given=True) == (1, True)


def test_keys_of_a_token_are_taken_from_where_it_stands_in_the_main_row():
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]]).bool()
    # Keys that say which row and column they are of.
    columns = torch.arange(6.0).expand(2, 6) + 10 * torch.arange(2.0)[:, None]
    main = DynamicCache()
    main.update(columns[:, None, :, None].clone(), -columns[:, None, :, None], 0)
    cache = prefix_cache(main, mask, 2, 2, DynamicCache())
    keys, values = cache.layers[0].keys[:, 0, :, 0], cache.layers[0].values[:, 0, :, 0]
    assert torch.equal(keys, -values)
    # Two columns longer than the main row 0, two shorter than row 1; what stands before a row is never looked at.
    assert keys[0].tolist() == [2, 3, 4, 5]
    assert keys[1, 3:].tolist() == [11]


def test_caches_that_forget_are_not_shared():
    from transformers import MistralConfig

    sliding = DynamicCache(config=MistralConfig(num_hidden_layers=2, sliding_window=4))
    assert not can_share(sliding)
    assert not can_share(DynamicCache())
    assert can_share(DynamicCache(config=MistralConfig(num_hidden_layers=2, sliding_window=None)))


def test_a_prompt_of_branches_that_differ_early_is_read_at_once(monkeypatch):
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    monkeypatch.setattr(
        Longer, "edit_tokens", lambda self, tokens, branch, context: torch.cat([tokens[:1], tokens[:1], tokens[1:]])
    )
    seen, hook = decoder_widths(zoo)
    with lmmhooks.wrap(zoo.model, Longer(beta=0.0)), torch.no_grad():
        zoo.model(**inputs)
    hook.remove()
    assert [rows for rows, _ in seen] == [8]
