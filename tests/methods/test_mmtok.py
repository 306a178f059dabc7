"""MMTok against loops over words, patches and what covers them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import lmmhooks
from lmmhooks.family import resolve
from lmmhooks.methods.reduction.mmtok import MMTok, coverage_rows
from tests.methods.choosing import FAMILIES, compare, plain, prompt_state
from tests.reference import diversity
from tests.zoo import FIRST_TEXT_ID, VOCAB, build

#: Words of the zoo's vocabulary that the list of function words holds, by id.
FUNCTION_WORDS = {FIRST_TEXT_ID + i for i in range(0, VOCAB - FIRST_TEXT_ID, 3)}


class Words:
    """A tokenizer of one word per id; every third is a function word, and two are what Qwen's prefix is made of."""

    chat_template = None

    def decode(self, ids, **kwargs):
        return " ".join("the" if i in FUNCTION_WORDS else f"w{i}" for i in ids)

    def __call__(self, text, add_special_tokens=True):
        assert not add_special_tokens
        ids = {"the": min(FUNCTION_WORDS), "Question:": 7}
        return {"input_ids": [ids.get(word) or int(word[1:]) for word in text.split()]}


@pytest.mark.parametrize("alpha", [0.5, 0.0])
@pytest.mark.parametrize("per_crop", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_naive_rendering_at_prefill_and_decode(family, per_crop, alpha):
    def naive(group):
        words = group.everything[group.layout.instruction[group.row, group.valid]]
        features = group.probes.get("vision_states", group.states)
        return plain(diversity.mmtok(words, group.states, features, 3, alpha))

    method = lmmhooks.method("mmtok", keep=3, words="tokens", per_crop=per_crop, alpha=alpha)
    if per_crop:
        method = lmmhooks.method("mmtok", keep=3, keep_per="crop", words="tokens", alpha=alpha)
    compare(family, method, naive, by_crop=per_crop)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_words_of_the_question_are_embedded_anew(family):
    embed = build(family).model.get_input_embeddings()
    inputs = build(family).inputs(batch=2, images=[2, 1])
    tokenizer = Words()

    def naive(group):
        ids = inputs["input_ids"][group.row, group.valid][group.layout.instruction[group.row, group.valid]].tolist()
        # The tokens that close and open an image are special ones, which the tokenizer does not write out as words.
        if family == "llava":
            wanted = [i for i in ids if i not in FUNCTION_WORDS]
        else:
            wanted = [7, *(min(FUNCTION_WORDS) if i in FUNCTION_WORDS else i for i in ids)]
        features = group.probes.get("vision_states", group.states)
        with torch.no_grad():
            words = embed(torch.tensor(wanted))
        return plain(diversity.mmtok(words, group.states, features, 3, 0.5))

    processor = SimpleNamespace(tokenizer=tokenizer)
    compare(family, lmmhooks.method("mmtok", keep=3), naive, by_crop=True, processor=processor)


def test_a_question_of_function_words_counts_whole():
    assert MMTok(keep=4, words="content")._wanted("what is it") == "what is it"
    assert MMTok(keep=4, words="content")._wanted("what is the cat's name?") == "cat name"
    assert MMTok(keep=4, words="question")._wanted("what is it") == "Question: what is it"


def test_published_words_depend_on_the_model():
    assert MMTok.defaults_for(resolve(build("llava").model)) == {"words": "content"}
    assert MMTok.defaults_for(resolve(build("qwen2_vl").model)) == {"words": "question"}


def test_without_a_processor_the_error_names_the_remedy():
    zoo = build("llava")
    inputs = zoo.inputs(batch=1)
    with lmmhooks.wrap(zoo.model, "mmtok(keep=4)"), pytest.raises(lmmhooks.PromptError, match="processor=processor"):
        zoo.model(**inputs)


def test_rows_with_fewer_words_are_as_if_alone():
    generator = torch.Generator().manual_seed(0)
    words, patches = torch.rand(2, 4, 6, generator=generator), torch.rand(2, 6, 6, generator=generator)
    rows = coverage_rows(words, torch.tensor([4, 2]), patches, 0.5, 0.02, 0.2)
    alone = coverage_rows(words[1:, :2], torch.tensor([2]), patches[1:], 0.5, 0.02, 0.2)
    assert torch.equal(rows[1, :2], alone[0, :2])
    assert torch.equal(rows[1, 2:4], torch.zeros(2, 6))
    assert torch.equal(rows[1, 4:], alone[0, 2:])
    # A word's coverage adds up to one over the words, a patch's to alpha over the patches.
    torch.testing.assert_close(alone[0, :2].sum(dim=1), torch.full((2,), 0.5), atol=1e-6, rtol=0)
    torch.testing.assert_close(alone[0, 2:].sum(dim=1), torch.full((6,), 0.5 / 6), atol=1e-6, rtol=0)


def test_without_any_text_the_image_alone_is_covered():
    zoo = build("llava")
    inputs = zoo.inputs(batch=1, text=0)
    inputs["input_ids"] = inputs["input_ids"][:, 3:]
    inputs["attention_mask"] = inputs["attention_mask"][:, 3:]
    state = prompt_state(zoo, inputs, "mmtok(keep=5, words='tokens')")
    (read,) = [v for memory in state._memory.values() for k, v in memory.items() if str(k).startswith("vision_states")]
    expected = diversity.mmtok(torch.zeros(0, 64), torch.zeros(16, 64), read[0], 5, 0.5)
    assert state.stages[0].index[0].tolist() == sorted(expected)


@pytest.mark.parametrize(
    "settings", [{"words": "nouns"}, {"alpha": -1.0}, {"text_temperature": 0.0}, {"visual_temperature": -0.2}]
)
def test_settings_out_of_range_are_refused_by_name(settings):
    with pytest.raises(lmmhooks.MethodError, match=next(iter(settings))):
        lmmhooks.method("mmtok", keep=4, **settings)
