"""The cost model against the worked figures of the literature, to every printed digit."""

from __future__ import annotations

import subprocess
import sys

import pytest
from transformers import CLIPVisionConfig, LlamaConfig, OPTConfig, Qwen2_5_VLConfig, Qwen3Config, SiglipVisionConfig

from lmmhooks.cost import (
    DecoderShape,
    Device,
    LayerCounts,
    VisionShape,
    attention_map_bytes,
    average_visual,
    calibrate_compute,
    decode_macs,
    decode_seconds,
    dense_counts,
    kv_bytes,
    layer_macs,
    literature_macs,
    prefill_macs,
    prefill_seconds,
    projector_macs,
    score_macs,
    solve_cut,
    solve_staged,
    vision_macs,
    visual_schedule,
)

LLAVA = DecoderShape(layers=32, width=4096, kv_width=4096, ffn_width=11008, vocabulary=32064)
QWEN = DecoderShape(layers=28, width=3584, kv_width=512, ffn_width=18944, vocabulary=152064)
MIB = 2**20


def printed(value: float, figure: str) -> str:
    """Write `value` with the decimals of `figure`, as the table does (.9 for 0.9)."""
    decimals = len(figure.split(".")[1]) if "." in figure else 0
    text = f"{value:.{decimals}f}"
    return text.removeprefix("0") if figure.startswith(".") else text


def pyramid(visual: int, boundaries: tuple[int, int, int]) -> dict[int, int]:
    return {boundary: visual // 2**stage for stage, boundary in enumerate(boundaries, start=1)}


# shape, visual, text, cuts, then the printed columns: average, TMAC, TFLOP, ratio, visual-only TMAC, KV MiB
WORKED = {
    "llava-1.5 base": (LLAVA, 576, 64, {}, "576", "4.252", "8.50", "1", "3.817", "320"),
    "llava-1.5 fastv K2 R.5": (LLAVA, 576, 64, {2: 288}, "306", "2.433", "4.87", ".572", "2.007", "185"),
    "llava-1.5 fastv K3 R.5": (LLAVA, 576, 64, {3: 288}, "315", "2.494", "4.99", ".587", "2.068", "189.5"),
    "llava-1.5 fastv K2 R.75": (LLAVA, 576, 64, {2: 144}, "171", "1.539", "3.08", ".362", "1.118", "117.5"),
    "llava-1.5 pyramiddrop": (
        LLAVA, 576, 64, pyramid(576, (8, 16, 24)), "270", "2.202", "4.40", ".518", "1.777", "167",
    ),
    "llava-1.5 vtw K16": (LLAVA, 576, 64, {16: 0}, "288", "2.334", "4.67", ".549", "1.909", "176"),
    "llava-1.5 192 before the LLM": (LLAVA, 576, 64, {0: 192}, "192", "1.675", "3.35", ".394", None, "128"),
    "llava-1.5 128 before the LLM": (LLAVA, 576, 64, {0: 128}, "128", "1.253", "2.51", ".295", None, "96"),
    "llava-1.5 64 before the LLM": (LLAVA, 576, 64, {0: 64}, "64", ".833", "1.67", ".196", None, "64"),
    "llava-next base": (LLAVA, 2880, 64, {}, "2880", "21.337", "42.67", "1", "20.825", "1472"),
    "llava-next fastv K2 R.5": (LLAVA, 2880, 64, {2: 1440}, "1530", "11.021", "22.04", ".516", "10.554", "797"),
    "llava-next fastv K2 R.75": (LLAVA, 2880, 64, {2: 720}, "855", "6.245", "12.49", ".293", "5.800", "459.5"),
    "llava-next pyramiddrop": (
        LLAVA, 2880, 64, pyramid(2880, (8, 16, 24)), "1350", "9.925", "19.85", ".465", "9.465", "707",
    ),
    "llava-next vtw K16": (LLAVA, 2880, 64, {16: 0}, "1440", "10.876", "21.75", ".510", "10.413", "752"),
    "qwen2.5-vl base": (QWEN, 1296, 40, {}, "1296", "9.076", "18.15", "1", None, "73.1"),
    "qwen2.5-vl fastv K2 R.5": (QWEN, 1296, 40, {2: 648}, "694", "4.905", "9.81", ".540", None, "40.2"),
    "qwen2.5-vl fastv K2 R.75": (QWEN, 1296, 40, {2: 324}, "393", "2.879", "5.76", ".317", None, "23.7"),
    "qwen2.5-vl pyramiddrop": (
        QWEN, 1296, 40, pyramid(1296, (7, 14, 21)), "607.5", "4.347", "8.69", ".479", None, "35.4",
    ),
    "qwen2.5-vl vtw K14": (QWEN, 1296, 40, {14: 0}, "648", "4.669", "9.34", ".514", None, "37.6"),
    "qwen2.5-vl video base": (QWEN, 16384, 40, {}, "16384", "161.31", "322.6", "1", None, "898"),
    "qwen2.5-vl video fastv K2 R.5": (QWEN, 16384, 40, {2: 8192}, "8777", "74.03", "148.1", ".459", None, "482"),
    "qwen2.5-vl video fastv K2 R.75": (QWEN, 16384, 40, {2: 4096}, "4974", "39.77", "79.5", ".247", None, "274"),
    "qwen2.5-vl video pyramiddrop": (
        QWEN, 16384, 40, pyramid(16384, (7, 14, 21)), "7680", "68.39", "136.8", ".424", None, "422",
    ),
}  # fmt: skip


@pytest.mark.parametrize("row", WORKED.values(), ids=WORKED.keys())
def test_worked_figures(row) -> None:
    shape, visual, text, cuts, average, tmac, tflop, ratio, visual_only, mib = row
    schedule = visual_schedule(shape.layers, visual, cuts)
    counts = dense_counts(text, schedule)
    macs = prefill_macs(shape, counts)
    base = prefill_macs(shape, dense_counts(text, [visual] * shape.layers))
    assert printed(average_visual(schedule), average) == average
    assert printed(macs / 1e12, tmac) == tmac
    assert printed(2 * macs / 1e12, tflop) == tflop
    assert printed(macs / base, ratio) == ratio
    assert printed(kv_bytes(shape, counts) / MIB, mib) == mib
    if visual_only is not None:
        assert printed(literature_macs(shape, schedule) / 1e12, visual_only) == visual_only


def test_shortv_row() -> None:
    counts = [LayerCounts.dense(640)] * 13 + [LayerCounts.frozen_visual(text=64, visual=576)] * 19
    macs = prefill_macs(LLAVA, counts)
    assert f"{macs / 1e12:.3f} {2 * macs / 1e12:.2f}" == "2.347 4.69"
    assert f"{macs / prefill_macs(LLAVA, dense_counts(64, [576] * 32)):.3f}" == "0.552"
    assert kv_bytes(LLAVA, counts) == 320 * MIB


def sparsevlm_counts(keep: tuple[int, int, int]) -> dict[int, int]:
    """Cuts after layers 2, 6 and 15, with the tokens that SparseVLM merges from what it drops added."""
    cuts, left = {}, 576
    for layer, kept in zip((2, 6, 15), keep, strict=True):
        dropped = left - kept
        left = kept + (int(0.3 * dropped) + 1) // 10 + 1
        cuts[layer + 1] = left
    return cuts


@pytest.mark.parametrize(
    ("keep", "average", "visual_only"),
    [
        ((300, 200, 110), "206.5", "1.353"),
        ((303, 110, 36), "145.4", "0.954"),
        ((66, 30, 17), "82.2", "0.541"),
    ],
)
def test_sparsevlm_rows(keep, average, visual_only) -> None:
    schedule = visual_schedule(32, 576, sparsevlm_counts(keep))
    # 82.25 is printed as 82.2 in the table as by Python (round half to even).
    assert f"{average_visual(schedule):.1f}" == average
    assert f"{literature_macs(LLAVA, schedule) / 1e12:.3f}" == visual_only


@pytest.mark.parametrize(
    ("shape", "millions", "kv"), [(LLAVA, "202.375", 524288), (QWEN, "233.046", 57344)], ids=["llava", "qwen"]
)
def test_constants_per_token(shape, millions, kv) -> None:
    assert f"{shape.linear_macs_per_token / 1e6:.3f}" == millions
    assert shape.kv_bytes_per_token() == kv


def test_published_tflops() -> None:
    """CDPruner's LLaVA-NeXT table: 41.7 T at 2880 visual tokens, 4.2 T at 320; FasterVLM adds the vision tower."""

    def tflops(visual: int) -> float:
        return 2 * literature_macs(LLAVA, [visual] * 32) / 1e12

    clip = VisionShape.from_config(clip_config())
    vision = 2 * 5 * vision_macs(clip, 576) / 1e12
    assert f"{tflops(2880):.1f}" == "41.7"
    assert f"{tflops(320):.1f}" == "4.2"
    assert tflops(2880) + vision == pytest.approx(43.6, abs=0.06)  # 43.56, printed with one decimal
    assert f"{literature_macs(LLAVA, [576] * 32) / 1e9:.0f}" == "3817"


def test_fastv_variant_has_two_ffn_matrices() -> None:
    three, two = (literature_macs(LLAVA, [576], ffn_matrices=count) for count in (3, 2))
    assert three - two == 576 * 4096 * 11008


def test_six_counts_of_every_kind() -> None:
    text, visual, prefix = 64, 576, 35
    n = text + visual
    assert LayerCounts.dense(n) == LayerCounts(n, n, n, n, n * n, n)
    assert LayerCounts.deleting(n, 100) == LayerCounts(n, n, n - 100, n - 100, n * n, n)
    assert LayerCounts.frozen_visual(text, visual) == LayerCounts(text, n, text, text, text * n, n)
    masked = LayerCounts.without_visual_pairs(text, visual, prefix)
    assert masked == LayerCounts(n, n, n, n, text * n + visual * prefix, n)
    assert LayerCounts.without_visual_pairs(text, visual, prefix, see_self=True).pairs == masked.pairs + visual
    local = LayerCounts.neighbourhood(text, visual, visual_pairs=visual * 25)
    assert local == LayerCounts(n, n, n, n, n * n - visual * visual + visual * 25, n)
    assert LayerCounts.block_sparse(n, 0.25) == LayerCounts(n, n, n, n, n * n / 4, n)
    assert LayerCounts.compressed_cache(n, 64) == LayerCounts(n, n, n, n, n * n, 64)


def test_causal_pairs_count_what_a_causal_mask_leaves() -> None:
    """Each constructor against a mask that is built and summed: prefix text, then the image, then the question."""
    text, visual, prefix = 7, 9, 3
    n = text + visual
    is_visual = [prefix <= position < prefix + visual for position in range(n)]
    allowed = [(query, key) for query in range(n) for key in range(query + 1)]
    text_rows = [(query, key) for query, key in allowed if not is_visual[query]]
    to_prefix = [(query, key) for query, key in allowed if is_visual[query] and key < prefix]
    between = [(query, key) for query, key in allowed if is_visual[query] and is_visual[key]]
    assert LayerCounts.dense(n, "causal").pairs == len(allowed)
    assert LayerCounts.frozen_visual(text, visual, prefix, "causal").pairs == len(text_rows)
    masked = LayerCounts.without_visual_pairs(text, visual, prefix, pairs="causal")
    assert masked.pairs == len(text_rows) + len(to_prefix)
    assert LayerCounts.neighbourhood(text, visual, len(between), "causal").pairs == len(allowed)
    with pytest.raises(ValueError, match="'square' or 'causal'"):
        LayerCounts.dense(n, "half")  # type: ignore[arg-type]


def test_layer_macs_by_hand() -> None:
    shape = DecoderShape(layers=1, width=8, kv_width=4, ffn_width=16, vocabulary=10)
    # 3 tokens: q and o 2*3*64, k and v 3*2*32, FFN 3*3*128, pairs 2*8*9.
    assert layer_macs(shape, LayerCounts.dense(3)) == 384 + 192 + 1152 + 144
    assert prefill_macs(shape, [LayerCounts.dense(3)], lm_head=True) == 384 + 192 + 1152 + 144 + 80
    # decode after 3 cached tokens, second step: linear 64+64+64+384, pairs 2*8*4, head 80.
    assert decode_macs(shape, [3], step=1) == 576 + 64 + 80
    ungated = DecoderShape(layers=1, width=8, kv_width=4, ffn_width=16, vocabulary=10, gated_ffn=False)
    assert layer_macs(shape, LayerCounts.dense(3)) - layer_macs(ungated, LayerCounts.dense(3)) == 3 * 128


def test_score_overhead() -> None:
    assert score_macs(LLAVA, tokens=640) == 4096**2 + 640 * 4096
    assert score_macs(LLAVA, tokens=640, rows=64) == 64 * (4096**2 + 640 * 4096)
    assert score_macs(QWEN, tokens=1336, recompute_keys=True) == 3584**2 + 1336 * 3584 * 512 + 1336 * 3584


@pytest.mark.parametrize(("heads", "tokens", "gib"), [(32, 640, "0.05"), (32, 2944, "1.03"), (28, 16424, "28.14")])
def test_attention_map_bytes(heads, tokens, gib) -> None:
    assert f"{attention_map_bytes(heads, tokens) / 2**30:.2f}" == gib


# -- budgets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("boundary", "average", "kept"),
    [(2, 192, 166), (2, 128, 98), (2, 96, 64), (2, 64, 30), (3, 192, 152), (3, 128, 82), (3, 96, 46), (3, 64, 11)],
)
def test_one_cut_meets_the_budget(boundary, average, kept) -> None:
    assert solve_cut(average, 576, 32, boundary) == kept
    # Half a token of rounding, spread over the layers after the cut.
    assert average_visual(visual_schedule(32, 576, {boundary: kept})) == pytest.approx(average, abs=0.5)


@pytest.mark.parametrize(
    ("average", "boundaries", "ratio", "counts"),
    [
        (192, [4, 12, 20], ".467", [268, 125, 58]),
        (128, [4, 12, 20], ".281", [161, 45, 12]),
        (64, [2, 8, 16], ".193", [110, 21, 4]),
    ],
)
def test_staged_cuts_meet_the_budget(average, boundaries, ratio, counts) -> None:
    keep_ratio, found = solve_staged(average, 576, 32, boundaries)
    assert (printed(keep_ratio, ratio), found) == (ratio, counts)
    reached = average_visual(visual_schedule(32, 576, dict(zip(boundaries, found, strict=True))))
    # One token more at the first cut is 28/32 of a token on average, so the largest fitting schedule is closer than 1.
    assert average - 1 < reached <= average


@pytest.mark.parametrize(
    ("label", "keep", "actual"),
    [("192", 180, "204.8"), ("128", 114, "142.9"), ("64", 48, "81.0"), ("dart", 68, "99.8")],
)
def test_true_budgets_of_nominal_labels(label, keep, actual) -> None:
    assert f"{average_visual(visual_schedule(32, 576, {2: keep})):.1f}" == actual


def test_infeasible_budgets_name_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"average 108; raise the budget to 108 or cut before layer 3 or earlier"):
        solve_cut(64, 576, 32, 6)
    with pytest.raises(ValueError, match="exceeds the 576"):
        solve_cut(600, 576, 32, 2)
    with pytest.raises(ValueError, match="0 to 31"):
        solve_cut(64, 576, 32, 32)
    with pytest.raises(ValueError, match="feasible averages are 144 to 576"):
        solve_staged(128, 576, 32, [8, 16, 24])
    with pytest.raises(ValueError, match="increasing layers"):
        solve_staged(128, 576, 32, [8, 4])
    assert solve_staged(576, 576, 32, [8, 16]) == (1.0, [576, 576])
    assert solve_cut(108, 576, 32, 6) == 0  # exactly what the layers before the cut need


def test_schedules_refuse_to_grow() -> None:
    assert visual_schedule(4, 10, {2: 3}) == [10, 10, 3, 3]
    assert visual_schedule(4, 10, {4: 0}) == [10, 10, 10, 10]
    with pytest.raises(ValueError, match="keeps 11 of 10"):
        visual_schedule(4, 10, {1: 11})
    with pytest.raises(ValueError, match="boundaries 0 to 4"):
        visual_schedule(4, 10, {5: 1})


# -- shapes from configs ----------------------------------------------------------------------------------------------


def clip_config() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
        patch_size=14,
    )  # fmt: skip


def test_decoder_shape_from_configs() -> None:
    llama = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, vocab_size=32064)
    assert DecoderShape.from_config(llama) == LLAVA
    qwen = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
            "num_key_value_heads": 4, "vocab_size": 152064,
        }
    )  # fmt: skip
    assert DecoderShape.from_config(qwen) == QWEN
    wide = DecoderShape.from_config(Qwen3Config(hidden_size=64, num_attention_heads=4, head_dim=32))
    assert wide.query_width == 128
    assert not DecoderShape.from_config(OPTConfig()).gated_ffn


def test_decoder_shape_refuses_what_it_cannot_count() -> None:
    with pytest.raises(ValueError, match="none of num_attention_heads"):
        DecoderShape.from_config(object())
    with pytest.raises(ValueError, match=r"DecoderShape\.width is 0"):
        DecoderShape(layers=1, width=0, kv_width=1, ffn_width=1, vocabulary=1)
    experts = LlamaConfig()
    experts.num_experts_per_tok = 2
    with pytest.raises(ValueError, match="mixture of experts"):
        DecoderShape.from_config(experts)
    hybrid = LlamaConfig()
    hybrid.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(ValueError, match="linear-attention"):
        DecoderShape.from_config(hybrid)


def test_vision_constants() -> None:
    clip = VisionShape.from_config(clip_config())
    assert f"{vision_macs(clip, 576) / 1e12:.3f}" == "0.191"
    assert f"{vision_macs(clip, 576, layers=23) / 1e12:.3f}" == "0.183"
    assert f"{projector_macs(576, (1024, 4096, 4096)) / 1e12:.3f}" == "0.012"

    qwen = VisionShape.from_config(Qwen2_5_VLConfig().vision_config)
    assert (qwen.layers, qwen.gated_ffn, qwen.window_patches, qwen.full_layers) == (32, True, 64, 4)
    qwen7b = VisionShape(
        layers=32, width=1280, ffn_width=3420, patch_inputs=1176, gated_ffn=True, window_patches=64, full_layers=4
    )
    merger = projector_macs(1296, (5120, 5120, 3584))
    assert f"{merger / 1e12:.2f}" == "0.06"
    assert f"{(vision_macs(qwen7b, 5184) + merger) / 1e12:.1f}" == "3.6"
    # 40 % of the unpruned decoder, which bounds what reductions inside it can gain.
    decoder = prefill_macs(QWEN, dense_counts(40, [1296] * 28))
    assert (vision_macs(qwen7b, 5184) + merger) / decoder == pytest.approx(0.40, abs=0.005)

    assert VisionShape.from_config(SiglipVisionConfig()).class_tokens == 0
    with pytest.raises(ValueError, match="known are clip_vision_model"):
        VisionShape.from_config(LlamaConfig())


# -- latency ----------------------------------------------------------------------------------------------------------


def test_roofline_matches_the_published_prefill() -> None:
    """8.5 TFLOP at half of an A100's peak: 54.5 ms predicted, 57.8 ms published."""
    a100 = Device(peak_flops=312e12, bandwidth=2.0e12)
    counts = dense_counts(64, [576] * 32)
    seconds = prefill_seconds(a100, LLAVA, counts)
    assert f"{seconds * 1e3:.1f}" == "54.5"
    assert prefill_seconds(a100, LLAVA, counts, vision_seconds=0.01) == pytest.approx(seconds + 0.01)
    calibrated = calibrate_compute(a100, LLAVA, counts, measured_seconds=0.0578)
    assert prefill_seconds(calibrated, LLAVA, counts) == pytest.approx(0.0578)
    with pytest.raises(ValueError, match="has to be positive"):
        calibrate_compute(a100, LLAVA, counts, measured_seconds=0)


def test_short_prompts_are_bound_by_reading_the_weights() -> None:
    a100 = Device(peak_flops=312e12, bandwidth=2.0e12)
    one, two = (prefill_seconds(a100, LLAVA, dense_counts(tokens, [0] * 32)) for tokens in (1, 2))
    assert one == two == pytest.approx(32 * LLAVA.linear_macs_per_token * 2 / 2.0e12)


def test_visual_pruning_saves_little_decode_time() -> None:
    """LLaVA-1.5 reads 13 GB of weights against 0.34 GB of cache per token, so pruning saves less than 3 %."""
    a100 = Device(peak_flops=312e12, bandwidth=2.0e12)
    full = decode_seconds(a100, LLAVA, [640] * 32)
    assert 0 < 1 - decode_seconds(a100, LLAVA, [64] * 32) / full < 0.03


def test_importing_the_cost_model_imports_no_torch() -> None:
    code = "import sys, lmmhooks.cost; print('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
