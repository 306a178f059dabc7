"""VScan: both scans and the merging against loops over tokens, inside models and alone."""

from __future__ import annotations

import pytest
import torch

import lmmhooks
from lmmhooks.engines.runtime import find_runtime
from lmmhooks.family import resolve
from lmmhooks.methods.reduction.scanning import merge_into_nearest, scan, windows_of
from lmmhooks.methods.reduction.vscan import VScan
from tests.engines.reducers import MROPE
from tests.methods.cuts import KWARGS, SEVERAL, equals_rendering, kept, same_bits
from tests.reference.decoder_cuts import layer_attention
from tests.reference.reduction import best, keep_only
from tests.zoo import build


def naive_scan(early, late, cells, window, num_keep, exact=False):
    """Tokens kept of a crop, in raster order; ``cells`` are pairs of row and column."""
    columns = -(-(max(col for _, col in cells) + 1) // window)
    groups: dict[int, list[int]] = {}
    for token, (row, col) in enumerate(cells):
        groups.setdefault(row // window * columns + col // window, []).append(token)
    num_local = int(num_keep * 0.5)
    local = [t for tokens in groups.values() for t in best({t: early[t] for t in tokens}, num_local // len(groups))]
    num_global = num_keep - (len(local) if exact else num_local)
    return sorted(local + best({t: late[t] for t in range(len(cells)) if t not in local}, num_global))


def naive_merge(states, stay):
    """States of the kept tokens, averaged with the dropped ones most like them."""
    members = {t: [states[t]] for t in stay}
    for token, state in enumerate(states):
        if token not in stay:
            likeness = {t: float(state @ states[t] / (state.norm() * states[t].norm())) for t in stay}
            members[min(stay, key=lambda t: (-likeness[t], t))].append(state)
    return {t: sum(found) / len(found) for t, found in members.items()}


def readings(zoo, inputs, method):
    """What the probes of the tower read, early and late, per position of the prompt; the layout; and the shares."""
    with torch.no_grad(), lmmhooks.wrap(zoo.model, method):
        zoo.model(**inputs)
        state = find_runtime(zoo.model).last
    names = [probe.name for probe in method.probes(resolve(zoo.model))[:2]]
    found = {key: value for memory in state._memory.values() for key, value in memory.items()}
    return found[names[0]], found[names[1]], state.layout


@pytest.mark.parametrize("second", [None, 0.5])
@pytest.mark.parametrize("family", [*SEVERAL, "llava_onevision", "qwen2_vl"])
def test_equals_the_naive_rendering_at_prefill_and_decode(family, second):
    method = VScan(keep=0.6, window=2, second=second, layer=2)

    def cuts(zoo, inputs, row, images):
        early, late, layout = readings(zoo, inputs, method)
        pad = int((inputs["attention_mask"][row] == 0).sum())

        def stage_1(alive, attention, prompt):
            by_number = {token.number: token for token in alive}
            for span in layout.spans_of(row):
                for crop in range(len(span.tokens.grids)):
                    inside = span.tokens.crop == crop
                    place = span.positions[inside].tolist()
                    cells = list(zip(span.tokens.row[inside].tolist(), span.tokens.col[inside].tolist(), strict=True))
                    num_keep = max(1, int(0.6 * len(place) + 1e-9))
                    if num_keep >= len(place):
                        continue
                    seen = [[float(scores[row, p]) for p in place] for scores in (early, late)]
                    stay = naive_scan(*seen, cells, 2, num_keep)
                    numbers = [p - pad for p in place]
                    merged = naive_merge([by_number[n].state for n in numbers], stay)
                    for token, state in merged.items():
                        by_number[numbers[token]].state = state
                    alive = keep_only(set(numbers), [numbers[t] for t in stay])(alive, None, prompt)
            return alive

        def stage_2(alive, attention, prompt):
            weights = layer_attention(zoo.model, 2, alive)
            place = {token.number: i for i, token in enumerate(alive)}
            spans = layout.spans_of(row)
            shown = {int(p) - pad for span in spans for p in span.positions[span.tokens.crop >= 0]}
            left = [n for n in place if n in shown]
            scores = {n: float(sum(head[place[prompt - 1], place[n]] for head in weights)) for n in left}
            return keep_only(set(left), best(scores, max(1, int(second * len(left)))))(alive, None, prompt)

        return {0: stage_1} if second is None else {0: stage_1, 2: stage_2}

    equals_rendering(family, method, cuts, renumber=family not in MROPE)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(("rows", "cols", "window"), [(4, 4, 2), (5, 7, 3), (3, 3, 6), (24, 24, 6)])
def test_scans_equal_the_naive_rendering(rows, cols, window, exact):
    generator = torch.Generator().manual_seed(0)
    # Few levels: ties abound, and the lower index wins them.
    early, late = torch.randint(0, 5, (2, 3, rows * cols), generator=generator).float()
    cells = [(r, c) for r in range(rows) for c in range(cols)]
    windows = windows_of(*torch.tensor(cells).T, window)
    for num_keep in range(1, rows * cols, max(1, rows * cols // 13)):
        index = scan(early, late, windows, num_keep, exact)
        for group in range(3):
            expected = naive_scan(early[group].tolist(), late[group].tolist(), cells, window, num_keep, exact)
            assert index[group].tolist() == expected
        if exact:
            assert index.shape[1] == num_keep


def test_what_does_not_divide_among_windows_is_lost_as_released():
    generator = torch.Generator().manual_seed(0)
    early, late = torch.rand(2, 1, 576, generator=generator)
    cell = torch.arange(576)
    windows = windows_of(cell // 24, cell % 24, 6)
    assert windows.shape == (16, 36)
    for num_keep, expected in ((96, 96), (100, 98), (40, 36)):
        assert scan(early, late, windows, num_keep, False).shape[1] == expected
        assert scan(early, late, windows, num_keep, True).shape[1] == num_keep


def test_tokens_without_cells_are_grouped_in_order():
    nowhere = torch.full((10,), -1)
    assert windows_of(nowhere, nowhere, 2).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, -1, -1]]


def test_merging_preserves_the_sum_of_tokens_times_their_count():
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, 12, 5, generator=generator)
    index = torch.tensor([[0, 3, 7], [1, 2, 11]])
    merged = merge_into_nearest(states, index)
    for group in range(2):
        expected = naive_merge(list(states[group]), index[group].tolist())
        torch.testing.assert_close(merged[group], torch.stack(list(expected.values())), atol=1e-6, rtol=0)
        unit = torch.nn.functional.normalize(states[group], dim=-1)
        nearest = (unit @ unit[index[group]].T).argmax(dim=1)
        count = torch.bincount(nearest, minlength=3)
        total = (count[:, None] * merged[group]).sum(dim=0)
        torch.testing.assert_close(total, states[group].sum(dim=0), atol=1e-5, rtol=0)
    twins = torch.ones(1, 4, 3)
    assert torch.equal(merge_into_nearest(twins, torch.tensor([[1, 2]])), torch.ones(1, 2, 3))


def test_published_settings():
    """96 of 576 tokens, 32 from layer 16 of 32 on: 64 on average."""
    method = VScan()
    assert (method.count(1 / 6, 576), method.count(1 / 3, 96)) == (96, 32)
    shape = type("Shape", (), {"num_layers": 32, "mrope": False})()
    assert [cut.layer for cut in method.cuts(shape)] == [0, 16]
    shares = method.shares(1 / 12, shape)
    assert [round(576 * share) for share in shares.values()] == [96, 32]
    assert list(method.shares(1.0, shape).values()) == [1.0, 1.0]
    shape.num_layers = 28
    assert [cut.layer for cut in method.cuts(shape)] == [0, 14]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llava", [("vision_cls", 0), ("vision_cls", 1)]),
        ("qwen2_5_vl", [("vision_received", 1), ("vision_received", 3)]),
    ],
)
def test_layers_of_the_scans(name, expected):
    found = VScan().probes(resolve(build(name).model))
    assert [(probe.signal, probe.layer) for probe in found[:2]] == expected
    family = resolve(build("llava").model)
    family.feature_layer = 22
    assert [probe.layer for probe in VScan().probes(family)[:2]] == [5, 22]


@pytest.mark.parametrize(("name", "window"), [("llava", 6), ("qwen2_5_vl", 4)])
def test_windows_are_those_of_the_release(name, window):
    with lmmhooks.wrap(build(name).model, "vscan") as patch:
        assert patch.methods[0].window == window
    with lmmhooks.wrap(build(name).model, "vscan(window=3)") as patch:
        assert patch.methods[0].window == 3


def test_newlines_stay_and_stage_two_ranks_all_crops_together():
    zoo = build("llava_next")
    inputs = zoo.inputs(batch=1)
    with torch.no_grad(), lmmhooks.wrap(zoo.model, VScan(keep=0.5, window=2, second=3)):
        zoo.model(**inputs)
        stages = find_runtime(zoo.model).last.stages
    newlines = (
        int((stages[0].layout.spans[0].tokens.crop < 0).sum()),
        int((stages[-1].layout.spans[0].tokens.crop < 0).sum()),
    )
    assert newlines[0] == newlines[1] > 0
    assert int((stages[-1].layout.spans[0].tokens.crop >= 0).sum()) == 3


def test_without_stage_two_it_is_a_reducer_before_the_decoder():
    zoo = build("llava")
    sets = kept(zoo, zoo.inputs(batch=1), VScan(keep=8, window=2, second=None))
    assert len({frozenset(found) for found in sets}) == 1
    assert len(sets[0]) == zoo.inputs(batch=1)["input_ids"].shape[1] - 8


def test_keeping_everything_changes_nothing():
    same_bits("llava", VScan(keep=1.0, second=None))
    same_bits("llava", VScan(keep=16, second=1.0))
    same_bits("llava", VScan(keep=16, second=0.5, layer=4))


@pytest.mark.parametrize("budget", [3, 8, 13])
def test_a_budget_is_met_by_both_stages(budget):
    zoo = build("llava")
    with torch.no_grad(), lmmhooks.wrap(zoo.model, VScan(budget=budget, window=2)) as patch:
        zoo.model(**zoo.inputs(batch=1))
        stats = patch.stats
    # Two cuts of whole tokens.
    assert budget - 2 * 2 / 4 <= stats.average_visual <= budget


@pytest.mark.parametrize(
    "beside", ["var(sink_dims='any', tau=2.6, rho=0.3)", "vcd(beta=0.0)", "v2drop(layers=(1, 3), ratios=(0.5, 0.5))"]
)
def test_it_composes(beside):
    zoo = build("llava")
    inputs = zoo.inputs(batch=2, images=[2, 1])
    own = VScan(keep=0.6, window=2, second=0.5)
    logits = []
    for methods in ([own, beside], [own]):
        with lmmhooks.wrap(zoo.model, *methods):
            logits.append(torch.stack(zoo.model.generate(**inputs, **KWARGS).logits))
    assert torch.isfinite(logits[0]).all()
    assert (logits[0] - logits[1]).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("settings", "name"),
    [({"second": 0.0}, "second"), ({"second": True}, "second"), ({"layer": 0}, "layer"), ({"window": 0}, "window")],
)
def test_values_out_of_range_are_refused_by_name(settings, name):
    with pytest.raises(lmmhooks.MethodError, match=name):
        lmmhooks.method("vscan", **settings)


def test_layers_that_attend_inside_windows_are_refused():
    with pytest.raises(lmmhooks.MethodError, match="attends inside windows"):
        lmmhooks.wrap(build("qwen2_5_vl").model, VScan(early=2))
