"""Searches that read candidates side by side and go back, one sample without the other, against plain forwards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

import lmmhooks
from lmmhooks.methods.decoding.search import Judgement, SearchMethod
from tests.reference.attention import full_logits
from tests.zoo import END, EOS, IMAGE, START, VIDEO, build

# float32 through four layers in other batches; largest difference seen is 8e-6.
TOLERANCE = 5e-5
FAMILIES = ("llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "internvl")
BEAMS, NEW = 2, 9


@dataclass(frozen=True)
class Wandering(SearchMethod):
    """Penalises nothing; sends the first of two samples back from its sixth token to its third, once."""

    id: ClassVar[str] = "test-wandering"

    judged: list[tuple[Tensor, Tensor]] = field(default_factory=list, compare=False)
    asked: list[int] = field(default_factory=list, compare=False)

    @property
    def candidates_per_beam(self) -> int:
        return 3

    def judge(self, attention: Tensor, image: Tensor, trail: Tensor) -> Judgement:
        self.judged.append((attention, image))
        trails = pad(trail, (0, 1))[:, None].expand(-1, attention.shape[1], -1)
        return Judgement(torch.zeros_like(image), trails, torch.zeros(len(image), dtype=torch.long))

    def retrospect(self, locations: Tensor, attempts: Mapping[int, int]) -> int | None:
        self.asked.append(locations.shape[1])
        first = len(self.asked) % 2 == 1
        return 2 if first and locations.shape[1] == 6 and not attempts else None


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_stay_those_of_forwards_without_cache_when_one_sample_went_back(name):
    zoo = build(name)
    banned = [EOS, IMAGE, VIDEO, START, END]
    silent = torch.zeros(zoo.model.lm_head.out_features)
    silent[banned] = -50
    zoo.model.lm_head.register_forward_hook(lambda module, args, output: output + silent)
    inputs = zoo.inputs(batch=2, images=[1, 2])
    method = Wandering()
    with lmmhooks.wrap(zoo.model, method):
        out = zoo.model.generate(
            **inputs,
            max_new_tokens=NEW,
            num_beams=BEAMS,
            num_return_sequences=BEAMS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    # Steps of the first sample: up to the sixth, again from the fourth; the second goes straight on.
    assert method.asked[0::2][:8] == [1, 2, 3, 4, 5, 6, 4, 5]
    assert method.asked[1::2][:8] == list(range(1, 9))
    length = inputs["input_ids"].shape[1]
    answers = out.sequences[:, length:]
    assert answers.shape[1] == NEW
    rows = torch.arange(2).repeat_interleave(BEAMS)
    for ordinal in range(BEAMS):
        own = answers[ordinal::BEAMS]
        expected = full_logits(zoo.model, inputs, own)[:, length - 1 : -1]
        for step in range(NEW):
            beams = out.beam_indices[ordinal::BEAMS, step].long()
            assert torch.equal(rows[beams], torch.arange(2))
            torch.testing.assert_close(out.logits[step][beams], expected[:, step], atol=TOLERANCE, rtol=0)


def test_what_candidates_attend_to_leaves_out_each_other():
    zoo = build("llava")
    method = Wandering()
    with lmmhooks.wrap(zoo.model, method):
        zoo.model.generate(**zoo.inputs(batch=2), max_new_tokens=4, num_beams=BEAMS, do_sample=False)
    for attention, image in method.judged:
        assert attention.shape[:2] == image.shape
        # Rows sum to 1 over prompt and answer; the prompt has text beside the image.
        assert bool((attention.sum(dim=-1) + image < 1).all())
        assert bool((attention > 0).all())


def test_attachments_go_and_come_with_the_patch():
    zoo = build("llava")
    before = sorted(vars(zoo.model))
    patch = lmmhooks.wrap(zoo.model, Wandering())
    assert any("candidates" in entry for entry in patch.attached)
    assert any("model.generate" in entry for entry in patch.attached)
    with patch.disabled():
        assert sorted(vars(zoo.model)) == before
    patch.remove()
    assert sorted(vars(zoo.model)) == before
