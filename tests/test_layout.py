"""Layouts of real prompts of every family, and the index arithmetic of reductions, decode steps and stacks."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlavaForConditionalGeneration

from lmmhooks.compat import takes_encoder_outputs
from lmmhooks.errors import PromptError
from lmmhooks.family import VisionInputs, resolve
from lmmhooks.layout import ImageTokens, Layout, Segment, VisualSpan, build_layout
from tests.zoo import BOS, FAMILIES, IMAGE, PAD, VIDEO, VIDEO_FAMILIES, Zoo, build, encode, zoo

__all__ = ["zoo"]


def layout_of(model: Zoo, inputs: dict[str, Any]) -> tuple[Layout, list[VisionInputs]]:
    vision = encode(model, inputs)
    return build_layout(inputs["input_ids"], inputs["attention_mask"], resolve(model.model), vision), vision


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", FAMILIES)
def test_segments_follow_the_prompt(zoo: Any, name: str, padding: str) -> None:
    model = zoo(name)
    inputs = model.inputs(4, [1, 2, 0, 1], padding=padding)
    layout, _ = layout_of(model, inputs)
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    assert torch.equal(layout.valid, mask)
    assert torch.equal(layout.visual, ids == IMAGE)
    for row in range(4):
        images = (ids[row] == IMAGE).nonzero().flatten()
        first = int(images[0]) if len(images) else -1
        for position in range(layout.length):
            segment = layout.segment[row, position]
            if not mask[row, position]:
                assert segment == Segment.PADDING
            elif ids[row, position] != IMAGE:
                assert segment == (Segment.SYSTEM if position < first else Segment.INSTRUCTION)
                assert layout.after_image[row, position] == (len(images) > 0 and position > first)
    assert layout.last.sum(dim=1).tolist() == [1, 1, 1, 1]
    end = mask.long() * torch.arange(layout.length)
    assert torch.equal(layout.last.long().argmax(dim=1), end.argmax(dim=1))


@pytest.mark.parametrize("adjacent", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_spans_hold_the_features_of_their_image(zoo: Any, name: str, adjacent: bool) -> None:
    """The decisive check of positions: the embedding the decoder gets at a span is that image's feature, in order."""
    model = zoo(name)
    inputs = model.inputs(3, [2, 0, 3], adjacent=adjacent)
    layout, (vision,) = layout_of(model, inputs)
    assert [(span.sample, span.image, span.source) for span in layout.spans] == [
        (0, 0, 0), (0, 1, 1), (2, 0, 2), (2, 1, 3), (2, 2, 4),
    ]  # fmt: skip
    seen: list[torch.Tensor] = []
    handle = model.model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        model.model(**inputs)
    handle.remove()
    features = iter(vision.output.pooler_output)
    entries = vision.entries_per_image
    assert entries is not None
    assert sum(entries) == vision.num_entries
    for span, count in zip(layout.spans, entries, strict=True):
        expected = torch.cat([next(features) for _ in range(count)])
        # The same call on the same pixels, so the same bits.
        assert torch.equal(seen[0][span.sample, span.positions], expected)
        assert len(span) == len(span.tokens)


@pytest.mark.parametrize("name", VIDEO_FAMILIES)
def test_images_and_videos_share_a_row(zoo: Any, name: str) -> None:
    model = zoo(name)
    inputs = model.inputs(3, [1, 0, 1], videos=[1, 1, 0])
    layout, _ = layout_of(model, inputs)
    assert [(s.sample, s.image, s.source, s.modality) for s in layout.spans] == [
        (0, 0, 0, "image"), (0, 1, 0, "video"), (1, 0, 1, "video"), (2, 0, 1, "image"),
    ]  # fmt: skip
    ids = inputs["input_ids"]
    assert torch.equal(layout.visual, (ids == IMAGE) | (ids == VIDEO))
    video = layout.spans[1]
    assert (ids[0, video.positions] == VIDEO).all()
    frames = video.tokens.crop[video.tokens.crop >= 0]
    assert frames.unique().tolist() == list(range(len(video.tokens.grids))) == [0, 1, 2]
    assert torch.equal(frames, frames.sort().values)


@pytest.mark.skipif(
    not takes_encoder_outputs(LlavaForConditionalGeneration),
    reason="before 5.20, images are encoded inside forward, where every beam brings its own",
)
@pytest.mark.parametrize("name", FAMILIES)
def test_beams_point_at_the_original_image(zoo: Any, name: str) -> None:
    """``generate`` repeats rows and features for beams; what the model then sees must resolve to the originals."""
    model = zoo(name)
    inputs = model.inputs(3, [2, 0, 1])
    family = resolve(model.model)
    core = model.model.model
    calls: list[VisionInputs] = []
    layouts: list[Layout] = []
    original = core.get_image_features

    @functools.wraps(original)
    def watched(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        calls.append(VisionInputs("image", kwargs, output))
        return output

    def before_core(module: Any, args: Any, kwargs: Any) -> None:
        if not layouts and calls:
            input_ids = args[0] if args else kwargs["input_ids"]
            layouts.append(build_layout(input_ids, kwargs["attention_mask"], family, calls))

    core.get_image_features = watched
    handle = core.register_forward_pre_hook(before_core, with_kwargs=True)
    try:
        model.model.generate(**inputs, max_new_tokens=1, num_beams=3, do_sample=False)
    finally:
        handle.remove()
        del core.get_image_features
    (layout,) = layouts
    assert layout.batch == 9
    assert [span.sample for span in layout.spans] == [0, 0, 1, 1, 2, 2, 6, 7, 8]
    assert [span.source for span in layout.spans] == [0, 1] * 3 + [2] * 3
    plain, _ = layout_of(model, inputs)
    repeated = plain.repeat(3)
    assert torch.equal(layout.segment, repeated.segment)
    for span, expected in zip(layout.spans, repeated.spans, strict=True):
        assert torch.equal(span.positions, expected.positions)
        assert torch.equal(span.tokens.row, expected.tokens.row)


def test_masked_visual_tokens_are_padding(zoo: Any) -> None:
    model = zoo("llava")
    inputs = model.inputs(1, 2)
    whole, vision = layout_of(model, inputs)
    first, second = whole.spans
    mask = inputs["attention_mask"].clone()
    mask[0, first.positions] = 0
    mask[0, second.positions[:3]] = 0
    layout = build_layout(inputs["input_ids"], mask, resolve(model.model), vision)
    assert [len(span) for span in layout.spans] == [0, 13]
    assert layout.spans[1].tokens.col.tolist() == [3, *([0, 1, 2, 3] * 3)]
    assert not layout.visual[0, first.positions].any()
    # What stands before the first visible image is system text again.
    assert (layout.segment[0, first.stop : second.start] == Segment.SYSTEM).all()


def test_no_mask_and_longer_mask(zoo: Any) -> None:
    model = zoo("llava")
    inputs = model.inputs(1)
    vision, family = encode(model, inputs), resolve(model.model)
    longer = torch.cat([torch.zeros(1, 4, dtype=torch.long), inputs["attention_mask"]], dim=1)
    plain = build_layout(inputs["input_ids"], None, family, vision)
    assert plain.valid.all()
    assert torch.equal(plain.segment, build_layout(inputs["input_ids"], longer, family, vision).segment)


def test_mismatch_names_both_counts(zoo: Any) -> None:
    model = zoo("llava")
    inputs = model.inputs(2, 1)
    vision, family = encode(model, inputs), resolve(model.model)
    ids = inputs["input_ids"].clone()
    ids[0, (ids[0] == IMAGE).nonzero()[0]] = 20
    with pytest.raises(PromptError, match="31 image tokens but its images give 32 features"):
        build_layout(ids, inputs["attention_mask"], family, vision)
    # The totals agree, the rows do not: the model would run, and scatter row 1's first feature into row 0.
    ids[1, 0] = IMAGE
    with pytest.raises(PromptError, match=r"15 image tokens .* 16 features \(in row 0"):
        build_layout(ids, inputs["attention_mask"], family, vision)
    with pytest.raises(PromptError, match="32 image tokens, but no image was given"):
        build_layout(inputs["input_ids"], inputs["attention_mask"], family, [])
    with pytest.raises(PromptError, match=r"attention_mask has shape \(2, 1, 1, 1\)"):
        build_layout(ids, torch.ones(2, 1, 1, 1), family, vision)


def test_text_only_batch_is_all_instruction(zoo: Any) -> None:
    model = zoo("qwen2_5_vl")
    inputs = model.inputs(2, 0)
    layout = build_layout(inputs["input_ids"], inputs["attention_mask"], resolve(model.model), [])
    assert layout.spans == ()
    assert torch.equal(layout.instruction, layout.valid)
    assert not layout.after_image.any()


# -- index arithmetic, on layouts that no model is needed for ----------------------------------------------------------


@st.composite
def layouts(draw: Any) -> Layout:
    """Any arrangement of padding, text and images in up to three rows."""
    batch = draw(st.integers(1, 3))
    rows, spans = [], []
    length = draw(st.integers(1, 24))
    for sample in range(batch):
        row = draw(st.lists(st.sampled_from([0, 1, 2, 3]), min_size=length, max_size=length))
        rows.append(row)
        places = torch.tensor([i for i, kind in enumerate(row) if kind == Segment.VISUAL], dtype=torch.long)
        cut = draw(st.integers(0, len(places)))
        for image, positions in enumerate((places[:cut], places[cut:])):
            n = len(positions)
            # Every token carries its own position as column: bookkeeping that went wrong shows.
            tokens = ImageTokens(torch.zeros(n).long(), torch.full((n,), sample), positions, ((3, 24),))
            spans.append(VisualSpan(sample, image, 2 * sample + image, "image", positions, tokens))
    return Layout(torch.tensor(rows, dtype=torch.int8), tuple(spans))


@st.composite
def reductions(draw: Any) -> tuple[Layout, torch.Tensor]:
    """A layout and an index that keeps a subset of every row, in any order, padded anywhere."""
    layout = draw(layouts())
    width = draw(st.integers(1, layout.length + 3))
    index = torch.full((layout.batch, width), -1)
    for row in range(layout.batch):
        kept = draw(st.lists(st.integers(0, layout.length - 1), unique=True, max_size=min(width, layout.length)))
        columns = draw(st.permutations(range(width)))[: len(kept)]
        index[row, torch.tensor(columns, dtype=torch.long)] = torch.tensor(kept, dtype=torch.long)
    return layout, index


def check_consistent(layout: Layout) -> None:
    """Spans and segments tell the same story."""
    visual = torch.zeros_like(layout.visual)
    for span in layout.spans:
        assert torch.equal(span.positions, span.positions.sort().values)
        assert not visual[span.sample, span.positions].any(), "two spans claim a position"
        visual[span.sample, span.positions] = True
        assert len(span) == len(span.tokens)
    assert torch.equal(visual, layout.visual)


@given(reductions())
@settings(max_examples=150, deadline=None)
def test_gather_moves_tokens_with_their_geometry(case: tuple[Layout, torch.Tensor]) -> None:
    layout, index = case
    reduced = layout.gather(index)
    check_consistent(reduced)
    assert reduced.length == index.shape[1]
    for row in range(layout.batch):
        for column, old in enumerate(index[row].tolist()):
            expected = Segment.PADDING if old < 0 else layout.segment[row, old]
            assert reduced.segment[row, column] == expected
    for before, after in zip(layout.spans, reduced.spans, strict=True):
        assert (before.sample, before.image, before.source) == (after.sample, after.image, after.source)
        # The column of a token is the position it came from.
        assert torch.equal(index[after.sample, after.positions], after.tokens.col)
        survivors = set(before.positions.tolist()) & set(index[before.sample].tolist())
        assert set(after.tokens.col.tolist()) == survivors


@given(layouts())
@settings(max_examples=50, deadline=None)
def test_identity_gather_changes_nothing(layout: Layout) -> None:
    same = layout.gather(torch.arange(layout.length).expand(layout.batch, -1))
    assert torch.equal(same.segment, layout.segment)
    for before, after in zip(layout.spans, same.spans, strict=True):
        assert torch.equal(before.positions, after.positions)


@given(reductions(), st.data())
@settings(max_examples=50, deadline=None)
def test_gathers_compose(case: tuple[Layout, torch.Tensor], data: Any) -> None:
    """Two reductions in a row are one reduction by the composed index."""
    layout, first = case
    width = first.shape[1]
    kept = data.draw(st.lists(st.integers(0, width - 1), unique=True, min_size=1))
    second = torch.tensor([kept] * layout.batch)
    composed = first.gather(1, second)
    twice, once = layout.gather(first).gather(second), layout.gather(composed)
    assert torch.equal(twice.segment, once.segment)
    for a, b in zip(twice.spans, once.spans, strict=True):
        assert torch.equal(a.positions, b.positions)
        assert torch.equal(a.tokens.col, b.tokens.col)


@given(layouts(), st.integers(0, 5))
@settings(max_examples=50, deadline=None)
def test_extend_appends_generated_columns_and_crop_takes_them_back(layout: Layout, num_new: int) -> None:
    longer = layout.extend(num_new)
    check_consistent(longer)
    assert longer.generated.sum() == layout.batch * num_new
    assert torch.equal(longer.segment[:, : layout.length], layout.segment)
    has_image = layout.visual.any(dim=1)
    assert torch.equal(longer.after_image[:, layout.length :], has_image[:, None].expand(-1, num_new))
    assert torch.equal(longer.crop(num_new).segment, layout.segment)
    check_consistent(layout.crop(min(num_new, layout.length)))


def test_rows_may_grow_by_different_numbers():
    layout = Layout(torch.tensor([[1, 2, 3], [0, 1, 2]], dtype=torch.int8), ())
    longer = layout.extend(2, torch.tensor([[True, True], [False, True]]))
    assert longer.segment.tolist() == [[1, 2, 3, 4, 4], [0, 1, 2, 0, 4]]
    assert longer.last.int().tolist() == [[0, 0, 0, 0, 1]] * 2


@given(st.lists(layouts(), min_size=1, max_size=3))
@settings(max_examples=50, deadline=None)
def test_stack_pads_shorter_layouts_on_the_left(parts: list[Layout]) -> None:
    stacked = Layout.stack(parts)
    check_consistent(stacked)
    assert stacked.batch == sum(part.batch for part in parts)
    row = 0
    for part in parts:
        rows = slice(row, row + part.batch)
        shift = stacked.length - part.length
        assert torch.equal(stacked.segment[rows, shift:], part.segment)
        assert not stacked.valid[rows, :shift].any()
        row += part.batch


@given(layouts(), st.integers(1, 3))
@settings(max_examples=50, deadline=None)
def test_repeat_is_sample_major(layout: Layout, times: int) -> None:
    repeated = layout.repeat(times)
    check_consistent(repeated)
    for row in range(repeated.batch):
        assert torch.equal(repeated.segment[row], layout.segment[row // times])
        assert [s.source for s in repeated.spans_of(row)] == [s.source for s in layout.spans_of(row // times)]


def test_indices_out_of_range_are_refused() -> None:
    layout = Layout(torch.tensor([[1, 3]], dtype=torch.int8), ())
    with pytest.raises(ValueError, match=r"index lies in \[0, 2\]; positions of this layout are 0 to 1"):
        layout.gather(torch.tensor([[0, 2]]))
    with pytest.raises(ValueError, match=r"index has shape \(2, 1\); expected \[1, new length\]"):
        layout.gather(torch.tensor([[0], [1]]))
    with pytest.raises(ValueError, match="num_new is -1"):
        layout.extend(-1)
    with pytest.raises(ValueError, match="num_gone is 3; this layout has 2 columns"):
        layout.crop(3)
    with pytest.raises(ValueError, match="at least one layout"):
        Layout.stack([])


def test_zoo_prompts_are_what_they_say(zoo: Any) -> None:
    """The zoo's own promises, on which everything above rests."""
    model = zoo("llava")
    inputs = model.inputs(2, [0, 1])
    ids = inputs["input_ids"]
    assert ids[0, 0] == PAD
    assert ids[1, 0] == BOS
    assert torch.equal(inputs["attention_mask"], (ids != PAD).long())
    other = build("llava", seed=1).model
    assert not torch.equal(other.lm_head.weight, model.model.lm_head.weight)
