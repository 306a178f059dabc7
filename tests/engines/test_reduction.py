"""The reduction engine against a decoder run row by row over Python lists, for reducers that exist only here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from transformers import DynamicCache

import lmmhooks
from lmmhooks.engines.runtime import find_runtime
from lmmhooks.methods.reduction.base import CropwiseMethod, Cut, Probe, ReductionMethod
from lmmhooks.methods.reduction.selection import top_ascending
from tests.reference.reduction import best, keep_only, reduced_logits
from tests.zoo import FAMILIES, VIDEO_FAMILIES, build

# float32 through four layers, batched against single rows; largest difference seen is 4e-6 on logits of about 3.
TOLERANCE = 2e-5
STEPS = 3
MROPE = {"qwen2_vl", "qwen2_5_vl", "qwen3_vl"}


@dataclass(frozen=True)
class ByNorm(ReductionMethod):
    """Keeps the states of largest norm: a choice that depends on what the layers before made of the tokens."""

    id: ClassVar[str] = "test-by-norm"

    layers: tuple[int, ...] = (0,)
    shares: tuple[float, ...] = (0.5,)
    hide: bool = False
    descending: bool = False
    average: bool = False
    newline: str = "rank"

    def cuts(self, family: Any) -> list[Cut]:
        return [Cut(layer, keep, self.hide) for layer, keep in zip(self.layers, self.shares, strict=True)]

    def select(self, tokens):
        index = tokens.states.norm(dim=-1).sort(dim=-1, descending=True, stable=True).indices[:, : tokens.num_keep]
        return index if self.descending else index.sort(dim=-1).values

    def merge(self, tokens, index):
        if not self.average:
            return None
        kept = tokens.states.gather(1, index[..., None].expand(-1, -1, tokens.states.shape[-1]))
        return (kept + tokens.states.mean(dim=1, keepdim=True)) / 2


def naive_by_norm(groups: list[list[int]], share: float, descending: bool = False, average: bool = False):
    """The same for tokens given by their number in the row; shares are of the tokens the group began with."""

    def choose(alive, attention, prompt):
        by_number = {token.number: token for token in alive}
        for group in groups:
            norms = {n: float(by_number[n].state.norm()) for n in group if n in by_number}
            stay = best(norms, max(1, int(share * len(group))))
            if descending:
                stay = sorted(stay, key=lambda n: -norms[n])
            if average:
                mean = torch.stack([by_number[n].state for n in norms]).mean(dim=0)
                for n in stay:
                    by_number[n].state = (by_number[n].state + mean) / 2
            alive = keep_only(set(group), stay)(alive, attention, prompt)
        return alive

    return choose


def visual_groups(model, inputs, row: int) -> list[list[int]]:
    """Per image, the numbers its tokens have among the row's tokens without padding."""
    with torch.no_grad(), lmmhooks.wrap(model, "reduction-identity"):
        model(**inputs)
        layout = find_runtime(model).last.layout
    number = layout.valid[row].long().cumsum(dim=0) - 1
    return [number[span.positions].tolist() for span in layout.spans_of(row)]


def check(zoo, eager, inputs, method, naive, renumber):
    """Prefill logits at every position and logits of the following steps, all rows, against the naive decoder."""
    with lmmhooks.wrap(zoo.model, method):
        with torch.no_grad():
            logits = zoo.model(**inputs).logits
        out = zoo.model.generate(
            **inputs, max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
    length = inputs["input_ids"].shape[1]
    assert logits.shape[1] == length
    answer = out.sequences[:, length:]
    with torch.no_grad():
        plain = zoo.model(**inputs).logits
    assert (logits[:, -1] - plain[:, -1]).abs().max() > 1e-2, "a reduction that changes nothing proves nothing"
    for row in range(len(logits)):
        groups = visual_groups(eager.model, inputs, row)
        cuts = {layer: (naive(layer, groups), renumber) for layer in method.layers}
        expected = reduced_logits(eager.model, inputs, row, cuts)
        valid = inputs["attention_mask"][row].bool()
        torch.testing.assert_close(logits[row, valid], expected, atol=TOLERANCE, rtol=0)
        steps = reduced_logits(eager.model, inputs, row, cuts, answer[:, :-1])[-STEPS:]
        torch.testing.assert_close(torch.stack(out.logits, dim=1)[row], steps, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("layers", [(0,), (2,), (0, 1, 3)], ids=str)
@pytest.mark.parametrize("positions", ["keep", "repack"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_a_decoder_that_runs_on_lists(family, positions, layers):
    if positions == "repack" and family in MROPE:
        return  # refused, see below
    zoo, eager = build(family), build(family, attn="eager")
    inputs = zoo.inputs(batch=2, images=[2, 1])
    shares = tuple(0.6 / 2**i for i in range(len(layers)))
    method = ByNorm(layers=layers, shares=shares, positions=positions)
    by_layer = dict(zip(layers, shares, strict=True))
    check(
        zoo, eager, inputs, method, lambda layer, groups: naive_by_norm(groups, by_layer[layer]), positions == "repack"
    )


@pytest.mark.parametrize(
    ("family", "prompt"),
    [
        ("llava", {"padding": "right", "images": 1}),
        ("qwen2_5_vl", {"padding": "right", "images": 1}),
        ("llava_next", {"images": [1, 0]}),
        ("qwen3_vl", {"images": [0, 2]}),
        ("internvl", {"images": [2, 1], "padding": "right"}),
        *((family, {"images": 1, "videos": 1}) for family in VIDEO_FAMILIES),
    ],
    ids=str,
)
def test_prompts_of_other_shapes(family, prompt):
    """Padded on the right, rows without images, videos beside images: logits of every prompt position."""
    zoo, eager = build(family), build(family, attn="eager")
    inputs = zoo.inputs(batch=2, **prompt)
    with torch.no_grad(), lmmhooks.wrap(zoo.model, ByNorm(layers=(0, 1), shares=(0.5, 0.25))):
        logits = zoo.model(**inputs).logits
    for row in range(2):
        groups = visual_groups(eager.model, inputs, row)
        renumber = family not in MROPE
        cuts = {0: (naive_by_norm(groups, 0.5), renumber), 1: (naive_by_norm(groups, 0.25), renumber)}
        valid = inputs["attention_mask"][row].bool()
        expected = reduced_logits(eager.model, inputs, row, cuts)
        torch.testing.assert_close(logits[row, valid], expected, atol=TOLERANCE, rtol=0)


def test_positions_may_be_renumbered_at_one_cut_and_kept_at_the_next():
    zoo, eager = build("llava"), build("llava", attn="eager")
    inputs = zoo.inputs(batch=2, images=[2, 1])

    @dataclass(frozen=True)
    class Later(ByNorm):
        id: ClassVar[str] = "test-later"
        conflicts: ClassVar[dict[str, str]] = {}

    first = ByNorm(positions="repack")
    second = Later(positions="keep", layers=(2,), shares=(0.5,))
    with lmmhooks.wrap(zoo.model, first, second) as patch:
        out = zoo.model.generate(
            **inputs, max_new_tokens=STEPS, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        kept = [layer.visual_kept for layer in patch.stats.layers]
    # A share is of what the second method finds, not of the prompt.
    assert kept == [(16, 8), (16, 8), (8, 4), (8, 4)]
    answer = out.sequences[:, inputs["input_ids"].shape[1] :]
    for row in range(2):
        groups = visual_groups(eager.model, inputs, row)

        def halve_again(alive, attention, prompt, groups=groups):
            left = {token.number for token in alive}
            return naive_by_norm([[n for n in g if n in left] for g in groups], 0.5)(alive, attention, prompt)

        cuts = {0: (naive_by_norm(groups, 0.5), True), 2: (halve_again, False)}
        steps = reduced_logits(eager.model, inputs, row, cuts, answer[:, :-1])[-STEPS:]
        torch.testing.assert_close(torch.stack(out.logits, dim=1)[row], steps, atol=TOLERANCE, rtol=0)


@dataclass(frozen=True)
class ByEarlyAttention(ReductionMethod):
    """Ranks by what the last row of layer 0 paid, two layers later."""

    id: ClassVar[str] = "test-by-early-attention"

    def cuts(self, family):
        return [Cut(2, self.keep)]

    def probes(self, family):
        return [Probe("decoder_rows", 0)]

    def select(self, tokens):
        return top_ascending(tokens.probes["decoder_rows[0, last]"], tokens.num_keep)


@pytest.mark.parametrize("first", [0, 1])
def test_what_was_read_before_another_cut_finds_its_tokens_after_it(first):
    zoo, eager = build("llava"), build("llava", attn="eager")
    inputs = zoo.inputs(batch=2, images=[2, 1])
    earlier = ByNorm(layers=(first,), positions="keep")
    with torch.no_grad(), lmmhooks.wrap(zoo.model, earlier, ByEarlyAttention(keep=3, positions="keep")):
        logits = zoo.model(**inputs).logits
    for row in range(2):
        groups = visual_groups(eager.model, inputs, row)
        scores: dict[int, float] = {}

        def note(alive, attention, prompt, groups=groups, scores=scores):
            place = {token.number: i for i, token in enumerate(alive)}
            visual = [n for group in groups for n in group if n in place]
            scores.update({n: float(attention[:, place[prompt - 1], place[n]].mean()) for n in visual})
            return alive

        def choose(alive, attention, prompt, groups=groups, scores=scores):
            left = {token.number for token in alive}
            for group in groups:
                stay = best({n: scores[n] for n in group if n in left}, 3)
                alive = keep_only(set(group), stay)(alive, attention, prompt)
            return alive

        def note_and_drop(alive, attention, prompt, groups=groups, note=note):
            return naive_by_norm(groups, 0.5)(note(alive, attention, prompt), attention, prompt)

        cuts = {1: (note_and_drop if first else note, False), 2: (choose, False)}
        if not first:
            cuts[0] = (naive_by_norm(groups, 0.5), False)
        expected = reduced_logits(eager.model, inputs, row, cuts)
        valid = inputs["attention_mask"][row].bool()
        torch.testing.assert_close(logits[row, valid], expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("layers", [(0,), (1,)], ids=str)
@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_order_and_merged_states_reach_the_decoder(family, layers):
    zoo, eager = build(family), build(family, attn="eager")
    method = ByNorm(layers=layers, descending=True, average=True, positions="keep" if family in MROPE else "repack")
    check(
        zoo, eager, zoo.inputs(batch=2, images=[2, 1]), method,
        lambda layer, groups: naive_by_norm(groups, 0.5, descending=True, average=True), family not in MROPE,
    )  # fmt: skip


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_pruning_equals_hiding(family, layer, attn):
    """Survivors cannot tell a token that left from one whose key they do not see."""
    zoo = build(family, attn=attn)
    inputs, single = zoo.inputs(batch=2, images=[2, 1]), zoo.inputs(batch=2)
    kwargs = {"max_new_tokens": 4, "output_logits": True, "return_dict_in_generate": True}
    outputs = []
    for hide in (False, True):
        with lmmhooks.wrap(zoo.model, ByNorm(layers=(layer,), hide=hide, positions="keep")):
            greedy = zoo.model.generate(**inputs, **kwargs, do_sample=False)
            # One image per row: transformers before 5.20 deals several out to the wrong beams.
            beams = zoo.model.generate(**single, num_beams=3, max_new_tokens=4, do_sample=False)
            torch.manual_seed(0)
            sampled = zoo.model.generate(**inputs, max_new_tokens=4, do_sample=True, top_k=0)
        outputs.append((torch.stack(greedy.logits), greedy.sequences, beams, sampled))
    pruned, hidden = outputs
    torch.testing.assert_close(pruned[0], hidden[0], atol=TOLERANCE, rtol=0)
    for one, other in zip(pruned[1:], hidden[1:], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("positions", ["keep", "repack"])
@pytest.mark.parametrize("layers", [(0,), (2,)], ids=str)
def test_generating_without_a_cache_gives_the_same_tokens(layers, positions):
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    with lmmhooks.wrap(zoo.model, ByNorm(layers=layers, positions=positions)):
        for settings in ({}, {"num_beams": 3}):
            kwargs = {"max_new_tokens": 4, "do_sample": False, **settings}
            cached = zoo.model.generate(**inputs, **kwargs)
            assert torch.equal(zoo.model.generate(**inputs, **kwargs, use_cache=False), cached)


@pytest.mark.parametrize("layers", [(0,), (2,)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_gaps_between_positions_are_not_read_as_packed_sequences(family, layers):
    """transformers takes positions with gaps for several sequences if there is neither a mask nor a cache."""
    zoo = build(family)
    inputs = zoo.inputs(batch=1)
    with torch.no_grad(), lmmhooks.wrap(zoo.model, ByNorm(layers=layers, positions="keep")):
        expected = zoo.model(**inputs).logits
        del inputs["attention_mask"]
        bare = zoo.model(**inputs, use_cache=False).logits
    torch.testing.assert_close(bare, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_caches_are_as_long_as_the_sequence_their_layer_saw(family):
    zoo = build(family)
    inputs = zoo.inputs(batch=2, images=[2, 1], text=5)
    with lmmhooks.wrap(zoo.model, ByNorm(layers=(1, 3), shares=(0.5, 0.25))) as patch:
        out = zoo.model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, return_dict_in_generate=True)
        stats = patch.stats
    full, lengths = inputs["input_ids"].shape[1], [layer.get_seq_length() for layer in out.past_key_values.layers]
    valid = inputs["attention_mask"].sum(dim=1)
    visual = torch.tensor(stats.layers[0].visual_in)
    for layer, length in enumerate(lengths):
        kept = torch.tensor(stats.layers[layer].visual_kept)
        # Of three generated tokens, two were fed back.
        assert length == (full if layer == 0 else int((valid - visual + kept).max())) + 2
    groups = [visual_groups(zoo.model, inputs, row) for row in range(2)]
    expected = [[sum(max(1, int(s * len(g))) for g in row) for row in groups] for s in (0.5, 0.25)]
    assert [list(stats.layers[i].visual_kept) for i in (1, 2, 3)] == [expected[0], expected[0], expected[1]]


@pytest.mark.parametrize("method", ["reduction-identity", "random(keep=10000)", "fastv(keep=10000)"])
@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_everything_is_bit_identical(family, method):
    zoo = build(family)
    inputs = zoo.inputs(batch=2, images=[2, 1])
    with torch.no_grad():
        plain = zoo.model(**inputs).logits
        with lmmhooks.wrap(zoo.model, method) as patch:
            assert any("final norm" in entry for entry in patch.attached)
            assert torch.equal(zoo.model(**inputs).logits, plain)


def test_a_share_of_one_attaches_nothing():
    zoo = build("llava")
    for spec in ("random(keep=1.0)", "uniform-grid(keep=1.0)", "fastervlm(keep=1.0)", "fastv(keep=1.0)"):
        with lmmhooks.wrap(zoo.model, spec) as patch:
            assert patch.attached == []


def test_a_prompt_without_images_is_left_alone():
    zoo = build("llava")
    inputs = {key: value for key, value in zoo.inputs(batch=2, images=1).items() if key != "pixel_values"}
    inputs["input_ids"] = inputs["input_ids"].clamp(min=8)
    with torch.no_grad():
        plain = zoo.model(**inputs).logits
        with lmmhooks.wrap(zoo.model, ByNorm(layers=(0, 2), shares=(0.5, 0.2))):
            assert torch.equal(zoo.model(**inputs).logits, plain)


def test_everything_visual_may_leave():
    zoo, eager = build("llava"), build("llava", attn="eager")
    inputs = zoo.inputs(batch=2, images=[2, 1])

    @dataclass(frozen=True)
    class Nothing(ByNorm):
        id: ClassVar[str] = "test-nothing"
        shares: tuple[Any, ...] = (0,)

    check(
        zoo, eager, inputs, Nothing(layers=(2,), positions="keep"),
        lambda layer, groups: keep_only({n for g in groups for n in g}, []), False,
    )  # fmt: skip


@dataclass(frozen=True)
class Thresholded(ReductionMethod):
    """As many tokens as have more than the mean norm: a number that only the data tells."""

    id: ClassVar[str] = "test-thresholded"
    layers: tuple[int, ...] = (1,)

    def cuts(self, family):
        return [Cut(layer, None) for layer in self.layers]

    def select(self, tokens):
        norms = tokens.states.norm(dim=-1)
        above = norms > norms.mean(dim=-1, keepdim=True)
        places = torch.arange(norms.shape[1]).expand_as(norms)
        return (
            places.masked_fill(~above, 10**6).sort(dim=-1).values.where(above.sort(dim=-1, descending=True).values, -1)
        )


def test_the_data_may_decide_how_many_stay():
    zoo, eager = build("llava"), build("llava", attn="eager")

    def naive(layer, groups):
        def choose(alive, attention, prompt):
            by_number = {token.number: token for token in alive}
            for group in groups:
                norms = {n: float(by_number[n].state.norm()) for n in group}
                mean = sum(norms.values()) / len(norms)
                alive = keep_only(set(group), [n for n in group if norms[n] > mean])(alive, attention, prompt)
            return alive

        return choose

    check(zoo, eager, zoo.inputs(batch=2, images=[2, 1]), Thresholded(positions="keep"), naive, False)


@dataclass(frozen=True)
class FirstOfCrop(CropwiseMethod):
    """The first cells of every crop."""

    id: ClassVar[str] = "test-first-of-crop"

    def select(self, tokens):
        assert tokens.grid is not None
        return torch.arange(tokens.num_keep).expand(len(tokens.sample), -1)


@pytest.mark.parametrize("newline", ["drop", "keep_per_row", "per_kept_row"])
@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_newline_tokens_follow_the_policy(family, newline):
    zoo = build(family)
    inputs = zoo.inputs(batch=1, images=1)
    method = FirstOfCrop(keep=3, keep_per="crop", newline=newline)
    with torch.no_grad(), lmmhooks.wrap(zoo.model, method):
        zoo.model(**inputs)
        state = find_runtime(zoo.model).last
    tokens, kept = state.layout.spans[0].tokens, state.stages[0].layout.spans[0].tokens
    # Cell by cell: which rows of the mosaic still hold a token.
    expected, first_left, row_start = [], [3] * len(tokens.grids), 0
    cells = list(zip(tokens.crop.tolist(), tokens.row.tolist(), tokens.col.tolist(), strict=True))
    for place, (crop, row, col) in enumerate(cells):
        if crop >= 0:
            if first_left[crop]:
                first_left[crop] -= 1
                expected.append((crop, row, col))
            continue
        in_row = [
            cell for cell in cells[row_start:place] if cell[0] != 0 or place < len(cells[: tokens.grids[0][0] ** 2])
        ]
        row_start = place + 1
        if newline == "keep_per_row" or (newline == "per_kept_row" and any(cell in expected for cell in in_row)):
            expected.append((crop, row, col))
    assert list(zip(kept.crop.tolist(), kept.row.tolist(), kept.col.tolist(), strict=True)) == expected
    newlines = sum(cell[0] < 0 for cell in expected)
    assert newlines == {"drop": 0, "keep_per_row": sum(c[0] < 0 for c in cells)}.get(newline, newlines)
    if newline == "per_kept_row":
        assert 0 < newlines < sum(cell[0] < 0 for cell in cells)


def test_integers_count_per_image_or_per_crop():
    zoo = build("internvl")
    inputs = zoo.inputs(batch=1, images=2)  # three tiles and one, four tokens each
    for keep_per, expected in (("image", 6 + 4), ("crop", 12 + 4)):
        with lmmhooks.wrap(zoo.model, FirstOfCrop(keep=6, keep_per=keep_per)) as patch, torch.no_grad():
            zoo.model(**inputs)
            assert patch.stats.layers[0].visual_kept == (expected,)
    with lmmhooks.wrap(zoo.model, "fastv(keep=3, layer=1)") as patch, torch.no_grad():
        zoo.model(**inputs)
        assert patch.stats.layers[1].visual_kept == (6,), "3 per image, ranked together"


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_gradients_and_logits_to_keep_see_the_full_length(family):
    zoo = build(family, seed=1)
    inputs = zoo.inputs(batch=2)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    with lmmhooks.wrap(zoo.model, ByNorm(layers=(0, 2), shares=(0.5, 0.25))):
        out = zoo.model(**inputs, labels=labels)
        out.loss.backward()
        with torch.no_grad():
            last = zoo.model(**inputs, logits_to_keep=2).logits
    assert torch.equal(last, out.logits[:, -2:].detach())
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)
    gradient = zoo.model.model.language_model.layers[0].mlp.up_proj.weight.grad
    assert gradient is not None
    assert gradient.abs().max() > 0
    zoo.model.zero_grad()


@pytest.mark.parametrize("layers", [(0,), (2,)], ids=str)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_text_may_continue_a_cache_without_positions(family, layers):
    """A plain loop over forward: the model itself would count positions from the shortened cache."""
    zoo, eager = build(family), build(family, attn="eager")
    inputs = zoo.inputs(batch=1)
    method = ByNorm(layers=layers)
    more = torch.tensor([[20, 21, 22]])
    with torch.no_grad(), lmmhooks.wrap(zoo.model, method):
        cache = DynamicCache(config=zoo.model.config.get_text_config())
        zoo.model(**inputs, past_key_values=cache)
        several = zoo.model(input_ids=more[:, :2], past_key_values=cache).logits
        one = zoo.model(input_ids=more[:, 2:], past_key_values=cache).logits
    cuts = {layers[0]: (naive_by_norm(visual_groups(eager.model, inputs, 0), 0.5), family not in MROPE)}
    expected = reduced_logits(eager.model, inputs, 0, cuts, more)[-3:]
    torch.testing.assert_close(torch.cat([several, one], dim=1)[0], expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("layers", [(0,), (2,)], ids=str)
def test_drafts_of_assisted_decoding_are_taken_back(layers):
    zoo = build("llava")
    # Every word occurs in the prompt, so that generated ones are looked up and drafts follow.
    inputs = zoo.inputs(batch=1, text=240)
    inputs["input_ids"][:, -240:] = torch.arange(8, 128).repeat(2)
    kwargs = {"max_new_tokens": 12, "do_sample": False, "suppress_tokens": list(range(8))}
    with lmmhooks.wrap(zoo.model, ByNorm(layers=layers)):
        plain = zoo.model.generate(**inputs, **kwargs)
        assert torch.equal(zoo.model.generate(**inputs, **kwargs, prompt_lookup_num_tokens=3), plain)


def test_generate_may_continue_a_conversation():
    zoo, eager = build("llava"), build("llava", attn="eager")
    inputs = zoo.inputs(batch=1)
    with lmmhooks.wrap(zoo.model, ByNorm(layers=(2,), positions="repack")):
        out = zoo.model.generate(**inputs, max_new_tokens=3, return_dict_in_generate=True, do_sample=False)
        ids = torch.cat([out.sequences, torch.tensor([[20, 21]])], dim=1)
        more = zoo.model.generate(
            input_ids=ids, past_key_values=out.past_key_values, max_new_tokens=2, min_new_tokens=2, do_sample=False,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    answer = more.sequences[:, inputs["input_ids"].shape[1] : -1]
    cuts = {2: (naive_by_norm(visual_groups(eager.model, inputs, 0), 0.5), True)}
    expected = reduced_logits(eager.model, inputs, 0, cuts, answer)[-2:]
    torch.testing.assert_close(torch.stack(more.logits, dim=1)[0], expected, atol=TOLERANCE, rtol=0)


def test_prompts_may_interleave():
    zoo = build("llava")
    prompts = [zoo.inputs(batch=1, seed=seed, text=4 + seed) for seed in (0, 1)]
    token = torch.tensor([[30]])
    with torch.no_grad(), lmmhooks.wrap(zoo.model, ByNorm(layers=(0, 2), shares=(0.5, 0.25))):
        alone = []
        for prompt in prompts:
            cache = DynamicCache()
            zoo.model(**prompt, past_key_values=cache)
            alone.append(zoo.model(input_ids=token, past_key_values=cache).logits)
        caches = [DynamicCache(), DynamicCache()]
        for prompt, cache in zip(prompts, caches, strict=True):
            zoo.model(**prompt, past_key_values=cache)
        together = [zoo.model(input_ids=token, past_key_values=cache).logits for cache in caches]
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


def test_an_exception_inside_leaves_the_next_prompt_unharmed():
    zoo = build("llava")
    inputs = zoo.inputs(batch=1)
    layer = zoo.model.model.language_model.layers[3]

    def fail(module, args):
        raise RuntimeError("from outside")

    with torch.no_grad(), lmmhooks.wrap(zoo.model, ByNorm(layers=(0, 2), shares=(0.5, 0.25))):
        expected = zoo.model(**inputs).logits
        handle = layer.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="from outside"):
            zoo.model(**inputs)
        handle.remove()
        assert torch.equal(zoo.model(**inputs).logits, expected)
        assert find_runtime(zoo.model).current is None


def test_nothing_of_the_prompt_is_held_after_it_was_read():
    zoo = build("qwen3_vl")
    with torch.no_grad(), lmmhooks.wrap(zoo.model, ByNorm(layers=(0, 1), shares=(0.5, 0.25))):
        zoo.model(**zoo.inputs(batch=1))
        state = find_runtime(zoo.model).last
    held = [value for memory in state._memory.values() for value in memory]
    assert "left" not in held
    assert "deepstack" not in held
    assert all(not stage.scratch for stage in state.stages)


def test_half_precision_runs():
    zoo = build("qwen3_vl", dtype=torch.bfloat16)
    with torch.no_grad(), lmmhooks.wrap(zoo.model, ByNorm(layers=(0, 1), shares=(0.5, 0.25), average=True)):
        logits = zoo.model(**zoo.inputs(batch=2)).logits
    assert logits.dtype == torch.bfloat16
    assert torch.isfinite(logits).all()


# -- what is refused --------------------------------------------------------------------------------------------------


def test_renumbering_grid_coordinates_is_refused_at_wrap():
    with pytest.raises(lmmhooks.MethodError, match="grid coordinates"):
        lmmhooks.wrap(build("qwen2_5_vl").model, ByNorm(positions="repack"))


def test_renumbering_hidden_tokens_is_refused_at_wrap():
    with pytest.raises(lmmhooks.MethodError, match="only hidden"):
        lmmhooks.wrap(build("llava").model, ByNorm(hide=True))


def test_sliding_windows_are_refused_at_wrap():
    zoo = build(
        "internvl", layer_types=["full_attention", "sliding_attention"] * 2, use_sliding_window=True, sliding_window=8
    )
    with pytest.raises(lmmhooks.ModelError, match="DynamicSlidingWindowLayer"):
        lmmhooks.wrap(zoo.model, ByNorm())


@pytest.mark.parametrize("implementation", ["static", "offloaded"])
def test_caches_of_one_length_are_refused(implementation):
    zoo = build("llava")
    with lmmhooks.wrap(zoo.model, ByNorm()), pytest.raises(lmmhooks.PromptError, match="plain DynamicCache"):
        zoo.model.generate(**zoo.inputs(batch=1), max_new_tokens=2, cache_implementation=implementation)


def test_generate_cannot_continue_a_cache_that_was_shortened_before_its_first_layer():
    """It would feed tokens a second time: it finds out by the length of the cache what is new."""
    zoo = build("llava")
    inputs = zoo.inputs(batch=1, text=30)
    with lmmhooks.wrap(zoo.model, ByNorm()):
        out = zoo.model.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True)
        ids = torch.cat([out.sequences, torch.tensor([[20, 21]])], dim=1)
        with pytest.raises(lmmhooks.PromptError, match="earlier cache"):
            zoo.model.generate(input_ids=ids, past_key_values=out.past_key_values, max_new_tokens=2)


def test_a_method_that_chooses_twice_is_told_so():
    @dataclass(frozen=True)
    class Twice(ByNorm):
        id: ClassVar[str] = "test-twice"

        def select(self, tokens):
            return torch.zeros(len(tokens.sample), tokens.num_keep, dtype=torch.long)

    zoo = build("llava")
    with lmmhooks.wrap(zoo.model, Twice()), pytest.raises(lmmhooks.MethodError, match="twice"):
        zoo.model(**zoo.inputs(batch=1))


def test_encoder_outputs_from_elsewhere_have_no_attention_to_read():
    zoo = build("llava")
    inputs = zoo.inputs(batch=1)
    with torch.no_grad():
        features = zoo.model.model.get_image_features(inputs.pop("pixel_values"), return_dict=True)
        with (
            lmmhooks.wrap(zoo.model, "fastervlm(keep=4)"),
            pytest.raises(lmmhooks.PromptError, match="outside the patch"),
        ):
            zoo.model(**inputs, mm_encoder_outputs={"image": features})
