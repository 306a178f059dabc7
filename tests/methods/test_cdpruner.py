"""CDPruner against determinants computed one by one, with relevance by word embeddings and by a CLIP text tower."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

import lmmhooks
from lmmhooks.methods.reduction import cdpruner
from lmmhooks.methods.reduction.cdpruner import scaled
from lmmhooks.methods.reduction.clip_relevance import ClipMatcher
from tests.methods.choosing import FAMILIES, compare, plain, prompt_state
from tests.reference import diversity
from tests.zoo import VOCAB, build

SEGMENT = 6


def word_tokenizer(offset: int, **special: str) -> PreTrainedTokenizerFast:
    """Words ``w8`` to ``w127``, each one token, ids moved by ``offset``."""
    words = {f"w{i}": i + offset for i in range(8, VOCAB)}
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(special.values())} | words, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if "eos_token" in special:
        begin, end = special["bos_token"], special["eos_token"]
        pairs = [(name, tokenizer.token_to_id(name)) for name in (begin, end)]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{begin} $A {end}", special_tokens=pairs)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.fixture(scope="module")
def processor():
    """As far as methods look: the tokenizer of the zoo's prompts."""
    return SimpleNamespace(tokenizer=word_tokenizer(0, unk_token="<unk>"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A folder with a CLIP checkpoint whose tower is as wide as the zoo's, and tokens of its own."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = word_tokenizer(10, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    text = {
        "vocab_size": 200, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": SEGMENT, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 16,
        "patch_size": 4,
    }  # fmt: skip
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
            elif "norm" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def words_of(group):
    """Word embeddings of the text after the first image of a row."""
    instruction = group.layout.instruction[group.row, group.valid]
    return group.everything[instruction]


def candidates(group):
    """Numbers in the row of all its visual tokens that show a place."""
    number = group.valid.long().cumsum(0) - 1
    spans = group.layout.spans_of(group.row)
    return [int(i) for span in spans for i in number[span.positions[span.tokens.crop >= 0]]]


@pytest.mark.parametrize("theta", [None, 0.0, 0.8])
@pytest.mark.parametrize("family", FAMILIES)
def test_word_embeddings_against_the_naive_rendering_at_prefill_and_decode(family, theta):
    power = (0.5 if theta is None else theta) / (2 * (1 - (0.5 if theta is None else theta)))

    def naive(group):
        mean = words_of(group).mean(dim=0, keepdim=True)
        visual = candidates(group)
        similar = diversity.cosines(group.everything[visual], mean)
        relevance = diversity.scaled({i: row[0] for i, row in zip(visual, similar, strict=True)})
        weight = [float(torch.tensor(power * relevance[i]).exp()) for i in group.numbers]
        return plain(diversity.cdpruner(group.states, weight, 3))

    method = lmmhooks.method("cdpruner", keep=3, keep_per="crop", theta=theta)
    compare(family, method, naive, by_crop=True)


@pytest.mark.parametrize("theta", [None, 0.5])
@pytest.mark.parametrize("sign", [None, 1])
@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_clip_against_the_naive_rendering_at_prefill_and_decode(family, sign, theta, clip, processor):
    model = CLIPModel.from_pretrained(clip)
    images = (2, 1)
    inputs = build(family).inputs(batch=2, images=list(images))
    zoo = build(family)
    state = prompt_state(zoo, inputs, lmmhooks.method("cdpruner", keep=3, clip=clip), processor=processor)
    (read,) = [v for memory in state._memory.values() for k, v in memory.items() if str(k).startswith("vision_states")]

    def naive(group):
        visual = candidates(group)
        features = read[group.row, group.valid][visual]
        # The zoo writes BOS, words, images with two words between, then the question.
        ids = inputs["input_ids"][group.row, group.valid][group.layout.instruction[group.row, group.valid]].tolist()
        tokens = [1, *(i + 10 for i in ids), 2]
        tokens += [0] * (-len(tokens) % SEGMENT)
        texts = []
        for start in range(0, len(tokens), SEGMENT):
            part = torch.tensor([tokens[start : start + SEGMENT]])
            real = int((part > 0).sum())
            hidden = model.text_model(part[:, :real]).last_hidden_state[0]
            # eos_token_id 2 means the largest id of a segment, as in the released checkpoints.
            texts.append(model.text_projection(hidden[part[0, :real].argmax()]))
        image = model.visual_projection(model.vision_model.post_layernorm(features))
        relevance = {
            number: (sign or -1) * sum(row) / len(row)
            for number, row in zip(visual, diversity.cosines(image, torch.stack(texts)), strict=True)
        }
        relevance = diversity.scaled(relevance)
        weight = [relevance[i] for i in group.numbers]
        if theta is not None:
            weight = [float(torch.tensor(theta / (2 * (1 - theta)) * r).exp()) for r in weight]
        return plain(diversity.cdpruner(group.states, weight, 3))

    method = lmmhooks.method("cdpruner", keep=3, keep_per="crop", clip=clip, sign=sign, theta=theta)
    with torch.no_grad():
        compare(family, method, naive, by_crop=True, images=images, processor=processor)


def test_the_clip_model_is_read_once_and_asked_the_question_of_each_row(clip, processor, monkeypatch):
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    asked = []

    class Noting(ClipMatcher):
        def __init__(self, *args):
            asked.append("loaded")
            super().__init__(*args)

        def similarity(self, patches, texts):
            asked.append(list(texts))
            return super().similarity(patches, texts)

    monkeypatch.setattr(cdpruner, "ClipMatcher", Noting)
    with torch.no_grad(), lmmhooks.wrap(zoo.model, lmmhooks.method("cdpruner", keep=4, clip=clip), processor=processor):
        zoo.model(**inputs)
        zoo.model(**inputs)
    assert asked[0] == "loaded"
    assert asked[1:] == [asked[1]] * 2
    for row, text in enumerate(asked[1]):
        assert text.split() == [f"w{i}" for i in inputs["input_ids"][row, -(5 + 3 * row) :].tolist()]


def test_padding_of_a_prompt_does_not_matter(clip, processor):
    zoo = build("llava_next")
    inputs = zoo.inputs(batch=3)
    method = lmmhooks.method("cdpruner", keep=4, clip=clip)
    together = prompt_state(zoo, inputs, method, processor=processor)
    for row in range(3):
        alone = prompt_state(zoo, zoo.row(inputs, row), method, processor=processor)
        for one, many in zip(alone.stages[0].layout.spans, together.stages[0].layout.spans_of(row), strict=True):
            assert all(torch.equal(getattr(one.tokens, n), getattr(many.tokens, n)) for n in ("crop", "row", "col"))


def test_relevance_is_scaled_over_candidates_only():
    relevance = torch.tensor([[5.0, 1.0, float("nan"), 3.0], [2.0, 2.0, 7.0, 2.0]])
    candidates = torch.tensor([[True, True, False, True], [True, True, False, False]])
    out = scaled(relevance, candidates)
    # 1e-6 in the numerator, as released.
    torch.testing.assert_close(out[0, [0, 1, 3]], torch.tensor([1.0, 0.0, 0.5]), atol=1e-6, rtol=0)
    assert out[0, 1] > 0
    assert out[1].tolist() == [1.0] * 4, "constant relevance: diversity alone"


def test_no_weight_on_relevance_ignores_the_question():
    zoo = build("llava")
    inputs = zoo.inputs(batch=1)
    other = dict(inputs, input_ids=inputs["input_ids"].clone())
    other["input_ids"][0, -5:] = torch.arange(20, 25)
    method = lmmhooks.method("cdpruner", keep=6, theta=0.0)
    same = [prompt_state(zoo, prompt, method).stages[0].index for prompt in (inputs, other)]
    assert torch.equal(*same)
    strong = lmmhooks.method("cdpruner", keep=6, theta=0.95)
    different = [prompt_state(zoo, prompt, strong).stages[0].index for prompt in (inputs, other)]
    assert not torch.equal(*different)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"relevance": "siglip"}, "relevance"),
        ({"relevance": "clip"}, "relevance"),
        ({"relevance": "embeddings", "clip": "folder"}, "clip"),
        ({"theta": 1.0}, "theta"),
        ({"sign": 0}, "sign"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(settings, name):
    with pytest.raises(lmmhooks.MethodError, match=f"cdpruner: {name}="):
        lmmhooks.method("cdpruner", keep=4, **settings)


def test_checkpoints_that_do_not_fit_are_refused_at_wrap(clip, tmp_path):
    llava = build("llava").model

    def wrap(model, folder):
        lmmhooks.wrap(model, lmmhooks.method("cdpruner", keep=4, clip=str(folder)))

    with pytest.raises(lmmhooks.MethodError, match="no checkpoint folder"):
        wrap(llava, tmp_path)
    llava.config.save_pretrained(tmp_path)
    with pytest.raises(lmmhooks.MethodError, match="a model of type 'llava'"):
        wrap(llava, tmp_path)
    config = CLIPConfig.from_pretrained(clip)
    config.vision_config.hidden_size = 64
    config.save_pretrained(tmp_path)
    with pytest.raises(lmmhooks.MethodError, match="width 64, the model's has 32"):
        wrap(llava, tmp_path)
    with pytest.raises(lmmhooks.MethodError, match="leave clip out"):
        wrap(build("internvl").model, clip)


def test_clip_needs_the_processor(clip):
    zoo = build("llava")
    with (
        lmmhooks.wrap(zoo.model, lmmhooks.method("cdpruner", keep=4, clip=clip)),
        pytest.raises(lmmhooks.PromptError, match="processor=processor"),
    ):
        zoo.model(**zoo.inputs(batch=1))
