"""Content words and the surroundings of a question, with the tokenizers of the bundled models."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

import lmmhooks
from lmmhooks.methods.attention.gift import Gift
from lmmhooks.methods.words import content_tokens, listed_words, load_tagger, surroundings, tagged_words

QUESTION = "What's the color of the two red circles?"


@pytest.fixture(scope="module", params=["tiny-llava", "tiny-qwen"])
def processor(request):
    return lmmhooks.load(request.param)[1]


def after_image(processor, question=QUESTION):
    """Ids of a chat prompt after its image token."""
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    text = processor.apply_chat_template([message], add_generation_prompt=True)
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    image = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    return ids[ids.index(image) + 1 :]


def test_the_template_is_told_from_the_question(processor):
    ids = after_image(processor)
    head, tail = surroundings(processor.tokenizer, ids)
    assert processor.tokenizer.decode(ids[head : len(ids) - tail]).strip() == QUESTION
    assert head == 1


def test_a_prompt_without_the_template_is_all_question(processor):
    ids = processor.tokenizer(QUESTION, add_special_tokens=False)["input_ids"]
    assert surroundings(processor.tokenizer, ids, unknown=3) == (0, 0)


def test_without_a_template_the_end_is_what_the_caller_knows(processor):
    tokenizer = processor.tokenizer
    bare = SimpleNamespace(chat_template=None, decode=tokenizer.decode)
    assert surroundings(bare, after_image(processor), unknown=3)[1] == 3


def test_templates_that_take_strings_only_are_read_too(processor, monkeypatch):
    tokenizer = processor.tokenizer
    template = "{% for m in messages %}{{ 'Q' + m['content'] + ' A:' }}{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    ids = tokenizer("Where is it? A:", add_special_tokens=False)["input_ids"]
    _, tail = surroundings(tokenizer, ids)
    assert tokenizer.decode(ids[len(ids) - tail :]).strip() == "A:"


def test_content_words_with_all_their_tokens(processor):
    tokenizer = processor.tokenizer
    ids = tokenizer(QUESTION, add_special_tokens=False)["input_ids"]
    flags = content_tokens(tokenizer, ids, listed_words)
    text = "".join(tokenizer.decode([token]) for token, flag in zip(ids, flags, strict=True) if flag)
    assert text.split() == ["color", "two", "red", "circles"]
    assert len(ids) > len(QUESTION.split()) + 2, "a question whose words are single tokens proves nothing"


def test_words_in_other_scripts_are_content(processor):
    tokenizer = processor.tokenizer
    ids = tokenizer("Is this \u732b\u3068\u72ac?", add_special_tokens=False)["input_ids"]
    flags = content_tokens(tokenizer, ids, listed_words)
    plain = tokenizer("Is this ", add_special_tokens=False)["input_ids"]
    if tokenizer.unk_token_id not in ids:
        assert any(flags[len(plain) :])
    assert not any(flags[:2])


def test_a_question_of_function_words_counts_whole(processor):
    tokenizer = processor.tokenizer
    family = SimpleNamespace(name="llava")
    question, counted = Gift().find_question(after_image(processor, "What is this?"), family, tokenizer)
    assert question == counted != []
    question, counted = Gift().find_question(after_image(processor), family, tokenizer)
    assert 0 < len(counted) < len(question)
    assert Gift(words="all").find_question(after_image(processor), family, tokenizer)[1] == question


def test_tagged_words_take_offsets_and_tags_of_spacy(monkeypatch):
    tags = {"What": "PRON", "'s": "AUX", "red": "ADJ", "ball": "NOUN"}

    def tagger(text):
        return [SimpleNamespace(idx=text.index(word), text=word, pos_=tag) for word, tag in tags.items()]

    load_tagger.cache_clear()
    monkeypatch.setitem(sys.modules, "spacy", SimpleNamespace(load=lambda name: tagger))
    text = "What's a red ball"
    assert [text[a:b] for a, b in tagged_words(text)] == ["red", "ball"]
    load_tagger.cache_clear()


def test_a_missing_model_of_the_tagger_is_named(monkeypatch):
    def load(name):
        raise OSError(f"[E050] Can't find model '{name}'.")

    load_tagger.cache_clear()
    monkeypatch.setitem(sys.modules, "spacy", SimpleNamespace(load=load))
    with pytest.raises(lmmhooks.MethodError, match="spacy download en_core_web_sm"):
        load_tagger()
