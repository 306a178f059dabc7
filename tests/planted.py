"""
A LLaVA model with attention sinks built into its weights, so that the right diagnosis is known exactly.

Two channels of the residual stream are reserved for massive activations and one for a constant that every ordinary
position carries; nothing else writes to them. In every layer the queries read the constant and the keys read the
massive channels, in the slowest rotary pair, so that all rows attend to the sinks. Vision sinks are written by an MLP
of the tower at chosen patches, and carried over by one unit of the projector.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.zoo import BOS, Zoo, build

#: Channels of massive activations, of the constant, and of the magnet.
MASSIVE = (11, 40)
CONSTANT, MAGNET_CHANNEL = 20, 25
SIZE = 2000.0
#: Text token that is planted as a magnet: attended to by every row, with an ordinary hidden state.
MAGNET = 77
#: Channels of the vision tower: outliers the projector carries over, outliers it ignores, sinks that are no outliers.
CARRIED, IGNORED, SILENT = 5, 9, 14


def plant_text(zoo: Zoo, *, first: bool = True, magnet: bool = False, pull: float = 3.0) -> Zoo:
    """
    Make the first token a sink, and optionally a text token a magnet.

    Parameters
    ----------
    zoo
        A llava model.
    first
        Whether the embedding of BOS carries the massive values.
    magnet
        Whether `MAGNET` is attended to.
    pull
        Factor on the part of the keys that attracts.
    """
    text = zoo.model.model.language_model
    reserved = [*MASSIVE, CONSTANT, MAGNET_CHANNEL]
    with torch.no_grad():
        table = text.embed_tokens.weight
        usual = float(table.std())
        table[:, reserved] = 0
        table[:, CONSTANT] = 4 * usual
        if first:
            table[BOS] = 0.01 * table[BOS]
            table[BOS, MASSIVE[0]], table[BOS, MASSIVE[1]] = SIZE, -0.75 * SIZE
        if magnet:
            table[MAGNET, MAGNET_CHANNEL] = 4 * usual
        for layer in text.layers:
            attention = layer.self_attn
            attention.o_proj.weight[reserved] = 0
            layer.mlp.down_proj.weight[reserved] = 0
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
                projection.weight[:, reserved] = 0
            # Half a head's width further on is the other half of the rotary pair; the last pair turns slowest.
            slow = attention.head_dim // 2 - 1
            heads = range(0, attention.q_proj.out_features, attention.head_dim)
            attention.q_proj.weight[[head + slow for head in heads], CONSTANT] = pull
            for head in range(0, attention.k_proj.out_features, attention.head_dim):
                attention.k_proj.weight[head + slow, MASSIVE[0]] = pull
                attention.k_proj.weight[head + slow, MAGNET_CHANNEL] = 12 * pull if magnet else 0
    return zoo


def plant_vision(
    zoo: Zoo, *, carried: Sequence[int] = (), ignored: Sequence[int] = (), silent: Sequence[int] = ()
) -> Zoo:
    """
    Plant outliers and sinks at patches of every image.

    Parameters
    ----------
    zoo
        A llava model, after `plant_text`.
    carried
        Patches whose features are outliers and become sinks in the decoder (V- and L-sinks).
    ignored
        Patches whose features are outliers that the projector does not read.
    silent
        Patches with features of ordinary norm that the projector turns into sinks.
    """
    core = zoo.model.model
    embeddings = core.vision_tower.embeddings
    reserved = [CARRIED, IGNORED, SILENT]
    with torch.no_grad():
        embeddings.class_embedding[reserved] = 0
        embeddings.patch_embedding.weight[reserved] = 0
        positions = embeddings.position_embedding.weight
        positions[:, reserved] = 0
        for channel, patches in ((CARRIED, carried), (IGNORED, ignored), (SILENT, silent)):
            for patch in patches:
                positions[patch + 1, channel] = 30.0
        layers = core.vision_tower.encoder.layers
        for layer in layers:
            for part in (layer.self_attn.out_proj, layer.mlp.fc2):
                part.weight[reserved] = 0
                part.bias[reserved] = 0
        # The layer the projector reads; behind the norm a planted patch holds about 5 in its channel, others about 0.
        mlp = layers[-2].mlp
        for unit, channel in enumerate((CARRIED, IGNORED)):
            mlp.fc1.weight[unit] = 0
            mlp.fc1.weight[unit, channel] = 10.0
            mlp.fc1.bias[unit] = -30.0
            mlp.fc2.weight[:, unit] = 0
            mlp.fc2.weight[channel, unit] = 10.0
        projector = core.multi_modal_projector
        projector.linear_1.weight[:, reserved] = 0
        for unit, channel in enumerate((CARRIED, SILENT)):
            projector.linear_1.weight[unit] = 0
            projector.linear_1.weight[unit, channel] = 10.0
            # Far below zero for ordinary patches, where the activation is flat.
            projector.linear_1.bias[unit] = -30.0
        reserved_text = [*MASSIVE, CONSTANT, MAGNET_CHANNEL]
        projector.linear_2.weight[reserved_text] = 0
        projector.linear_2.bias[reserved_text] = 0
        projector.linear_2.bias[CONSTANT] = 4 * core.language_model.embed_tokens.weight[BOS + 1 :].std()
        projector.linear_2.weight[:, :2] = 0
        for unit, gain in ((0, 1.0), (1, 100.0)):
            projector.linear_2.weight[MASSIVE[0], unit] = gain
            projector.linear_2.weight[MASSIVE[1], unit] = -0.75 * gain
    return zoo


def planted(layers: int = 6, **patches: Any) -> Zoo:
    """A llava model with a first-token sink and whatever is planted at patches; see `plant_vision`."""
    return plant_vision(plant_text(build("llava", layers=layers)), **patches)


def with_magnet(inputs: dict[str, Tensor], column: int) -> dict[str, Tensor]:
    """The inputs with the magnet at a column of every row."""
    ids = inputs["input_ids"].clone()
    ids[:, column] = MAGNET
    return {**inputs, "input_ids": ids}
