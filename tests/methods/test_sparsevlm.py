"""SparseVLM against full attention matrices, raters and clusters found one number at a time."""

from __future__ import annotations

import math

import pytest
import torch

import lmmhooks
from lmmhooks.engines import editing
from lmmhooks.engines.runtime import find_runtime
from lmmhooks.family import resolve
from lmmhooks.methods.reduction.clustering import cluster_means, density_peaks
from lmmhooks.methods.reduction.raters import RATERS
from lmmhooks.methods.reduction.sparsevlm import TABLES, SparseVLM, recycled_counts
from tests.engines.reducers import MROPE, visual_groups
from tests.methods.cuts import KWARGS, SEVERAL, equals_rendering, kept, same_bits
from tests.reference import decoder_cuts
from tests.reference.reduction import _tokens
from tests.zoo import build


def raters(zoo, inputs, row, images):
    prompt = int(inputs["attention_mask"][row].sum())
    visual = [n for image in images for n in image]
    return decoder_cuts.rater_numbers(_tokens(zoo.model, inputs, row, None), visual, prompt)


@pytest.mark.parametrize("block", [512, 3])
@pytest.mark.parametrize("family", SEVERAL)
def test_equals_the_naive_rendering_at_prefill_and_decode(family, block, monkeypatch):
    # Rows of long prompts are read in blocks.
    monkeypatch.setattr(editing, "ROW_BLOCK", block)
    table = {1: 300, 2: 150}

    def cuts(zoo, inputs, row, images):
        counts = {layer: lambda v, rows, n=n: int(n / 576 * v + 1e-9) for layer, n in table.items()}
        return decoder_cuts.sparsevlm(images, raters(zoo, inputs, row, images), counts, merges=True)

    method = SparseVLM(layers=tuple(table), table=tuple(table.values()))
    equals_rendering(family, method, cuts, renumber=family not in MROPE)


def test_several_clusters():
    """Of 32 pruned tokens ten are merged, into two."""

    def cuts(zoo, inputs, row, images):
        counts = {1: lambda v, rows: int(72 / 576 * v)}
        return decoder_cuts.sparsevlm(images, raters(zoo, inputs, row, images), counts, merges=True)

    zoo = build("llava_next")
    inputs = zoo.inputs(batch=2, images=[1, 2])
    assert max(len(group) for row in range(2) for group in visual_groups(zoo.model, inputs, row)) > 36
    equals_rendering("llava_next", SparseVLM(layers=(1,), table=(72,)), cuts, renumber=True)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "internvl"])
def test_the_rank_rule_of_the_first_release(family):
    scale, bias = 0.7, 1

    def count(v, rows):
        rank = int(torch.linalg.matrix_rank(rows))
        return max(v, 0) if rank == rows.shape[1] else min(int(rank * scale + bias), rows.shape[1] - 1)

    def cuts(zoo, inputs, row, images):
        counts = {1: count, 2: count}
        return decoder_cuts.sparsevlm(images, raters(zoo, inputs, row, images), counts, merges=True)

    method = SparseVLM(version="1.0", layers=(1, 2), scale=scale, bias=bias)
    equals_rendering(family, method, cuts, renumber=family not in MROPE)


@pytest.mark.parametrize("correct", [True, False])
@pytest.mark.parametrize("family", ["llava", "llava_next", "internvl", "qwen3_vl"])
def test_the_second_release_reads_half_of_the_heads_and_corrects_for_distance(family, correct):
    if family in MROPE and correct:
        pytest.skip("refused by design: positions are grid coordinates")

    def cuts(zoo, inputs, row, images):
        config = zoo.model.config.text_config
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        base = config.rope_parameters["rope_theta"]

        def gravity(distance):
            angles = [distance * base ** (-2 * k / width) for k in range(width // 2)]
            return max(2 / math.sqrt(width) * sum(map(math.cos, angles)), 0.01)

        def head_score(attention, rater, number):
            return attention / gravity(rater - number) if correct else attention

        counts = {1: lambda v, rows: int(400 / 576 * v + 1e-9), 2: lambda v, rows: int(150 / 576 * v + 1e-9)}
        found = raters(zoo, inputs, row, images)
        return decoder_cuts.sparsevlm(images, found, counts, merges=False, head_score=head_score)

    method = SparseVLM(version="2.0", layers=(1, 2), table=(400, 150), gravity=correct)
    equals_rendering(family, method, cuts)


def test_clusters_equal_the_naive_rendering_and_break_ties_by_index():
    generator = torch.Generator().manual_seed(0)
    for count, num in ((1, 1), (13, 2), (40, 5)):
        states = torch.randn(2, count, 6, generator=generator)
        # Equal vectors and mutually nearest pairs: densities tie exactly.
        states[:, count // 2 :] = states[:, : count - count // 2] if count > 1 else states
        centres, cluster = density_peaks(states, num)
        means = cluster_means(states, cluster, num)
        for group in range(2):
            expected, assigned = decoder_cuts.density_peaks(list(states[group]), num)
            assert (centres[group].tolist(), cluster[group].tolist()) == (expected, assigned)
            for c in range(num):
                members = states[group][[i for i in range(count) if assigned[i] == c]]
                torch.testing.assert_close(means[group, c], members.mean(dim=0), atol=1e-5, rtol=1e-5)


def test_counts_of_the_released_tables():
    assert recycled_counts(276, 0.3, 0.1) == (83, 9)
    assert recycled_counts(1, 0.3, 0.1) == (1, 1)
    assert recycled_counts(1, 1.0, 1.0) == (1, 1)
    method = SparseVLM()
    for numbers in (numbers for tables in TABLES.values() for numbers in tables.values()):
        assert [method.count(number / 576, 576) for number in numbers] == list(numbers)

    def average(label):
        left, total = 576, 576 * 3
        for number, layers in zip(TABLES["1.5"][label], (4, 9, 16), strict=True):
            left = number + recycled_counts(left - number, 0.3, 0.1)[1]
            total += left * layers
        return total / 32

    # The averages that the published labels of release 1.5 come to.
    assert [round(average(label), 1) for label in (192, 128, 96, 64)] == [206.5, 145.4, 114.1, 82.2]


def test_merged_tokens_stand_behind_the_others_of_their_image():
    zoo = build("llava")
    inputs = zoo.inputs(batch=1, images=2)
    with torch.no_grad(), lmmhooks.wrap(zoo.model, SparseVLM(layers=(1,), table=(144,))):
        zoo.model(**inputs)
        state = find_runtime(zoo.model).last
    index = state.stages[1].index[0].tolist()
    for span in state.layout.spans:
        stay = [place for place in index if span.start <= place < span.stop]
        assert len(stay) == 4 + 1
        assert stay[:4] == sorted(stay[:4])
    text = [place for place in index if not state.layout.visual[0, place]]
    assert text == [place for place in range(inputs["input_ids"].shape[1]) if not state.layout.visual[0, place]]


def test_raters_are_never_none():
    """Where all text is equally relevant, none is above the mean: all of it rates."""
    zoo = build("llava")
    inputs = zoo.inputs(batch=1, text=4)
    inputs["input_ids"][0, -4:] = 9
    with torch.no_grad(), lmmhooks.wrap(zoo.model, SparseVLM(layers=(1,), table=(144,))):
        zoo.model(**inputs)
        state = find_runtime(zoo.model).last
    found = next(v for m in state._memory.values() for k, v in m.items() if k == RATERS.name)
    # The last token differs from the others by its position alone, and embeddings have none.
    assert found[1][0, :, 0].nonzero().flatten().tolist() == list(range(19, 23))


def test_lengths_of_caches_and_decode_positions():
    zoo = build("llava")
    inputs = zoo.inputs(batch=1)
    method = SparseVLM(layers=(1, 2), table=(300, 110))
    sets = kept(zoo, inputs, method)
    # 8 of 16 and one merged; 3 of those 9 and one merged.
    assert [len(sets[0]) - len(found) for found in sets] == [0, 0, 16 - 9, 16 - 4]
    seen = []
    with lmmhooks.wrap(zoo.model, method):
        hook = zoo.model.model.language_model.layers[3].register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["position_ids"][0].tolist()), with_kwargs=True
        )
        out = zoo.model.generate(**inputs, **KWARGS)
        hook.remove()
    length = len(sets[3])
    assert seen == [list(range(length)), [length], [length + 1]]
    assert [layer.get_seq_length() for layer in out.past_key_values.layers] == [len(found) + 2 for found in sets]


def test_a_table_of_everything_changes_nothing():
    same_bits("llava", SparseVLM(layers=(1, 2), table=(576, 576)))


@pytest.mark.parametrize("version", ["1.5", "2.0"])
def test_a_budget_counts_merged_tokens(version):
    zoo = build("llava")
    method = SparseVLM(layers=(1, 2), version=version, budget=11, table=(300, 100))
    with torch.no_grad(), lmmhooks.wrap(zoo.model, method) as patch:
        zoo.model(**zoo.inputs(batch=1))
        stats = patch.stats
    # Two cuts of whole tokens.
    assert 11 - 2 / 4 * 2 <= stats.average_visual <= 11


@pytest.mark.parametrize("beside", ["var(sink_dims='any', tau=2.6, rho=0.3)", "vcd(beta=0.0)", "fastervlm(keep=12)"])
def test_it_composes(beside):
    zoo = build("llava")
    inputs = zoo.inputs(batch=2, images=[2, 1])
    logits = []
    own = "sparsevlm(layers=(1, 2), table=(300, 110))"
    for methods in ([own, beside], [own]):
        with lmmhooks.wrap(zoo.model, *methods):
            logits.append(torch.stack(zoo.model.generate(**inputs, **KWARGS).logits))
    assert torch.isfinite(logits[0]).all()
    assert (logits[0] - logits[1]).abs().max() > 1e-4


def test_published_layers_and_presets():
    family = type("Shape", (), {"num_layers": 32})()
    assert [cut.layer for cut in SparseVLM().cuts(family)] == [3, 7, 16]
    first = lmmhooks.method("sparsevlm", preset="v1.0-pope")
    assert [(cut.layer, cut.keep) for cut in first.cuts(family)] == [(3, None), (7, None), (16, None), (20, None)]
    assert (first.scale, first.bias) == (9.0, 6)
    assert SparseVLM(layers=(3,), table=(10,)).cuts(resolve(build("llava").model)) == []


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"version": "3.0"}, "version"),
        ({"table": 200}, "table"),
        ({"table": (100, 200, 50)}, "table"),
        ({"table": (600, 200, 50)}, "table"),
        ({"tau": 1.5}, "tau"),
        ({"theta": -0.1}, "theta"),
        ({"scale": 0}, "scale"),
        ({"least": 0.0}, "least"),
        ({"version": "1.0", "budget": 0.5}, "budget"),
    ],
)
def test_values_out_of_range_are_refused_by_name(settings, name):
    with pytest.raises(lmmhooks.MethodError, match=name):
        lmmhooks.method("sparsevlm", **settings)


def test_the_correction_for_distance_is_refused_where_positions_are_coordinates():
    with pytest.raises(lmmhooks.MethodError, match="gravity=False"):
        lmmhooks.wrap(build("qwen2_5_vl").model, SparseVLM(version="2.0"))
