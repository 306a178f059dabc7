"""Where a transformer layer keeps its attention and its feed-forward module."""

from __future__ import annotations

from torch import Tensor, nn

from .errors import ModelError

__all__ = ["LayerParts"]


class LayerParts:
    """Base of `lmmhooks.family.Family`: the parts of one decoder or vision layer."""

    @staticmethod
    def apply(module: nn.Module, states: Tensor) -> Tensor:
        """
        What a part of the model makes of states that are not its own, on the device of its weights.

        Hooks on the part are passed by: they belong to the forward that the model itself runs.
        """
        weight = next(module.parameters(), None)
        # Where accelerate loads weights on demand, forward is already the function that moves its inputs.
        output: Tensor = module.forward(states if weight is None or weight.is_meta else states.to(weight.device))
        return output

    @staticmethod
    def attention_of(layer: nn.Module) -> nn.Module:
        """
        The self-attention module of a decoder or vision layer.

        Raises
        ------
        ModelError
            The layer has none, for example a linear-attention layer of a hybrid decoder.
        """
        for child in layer.children():
            if type(child).__name__.endswith("Attention"):
                return child
        raise ModelError(
            f"layer {type(layer).__name__} holds no attention module (a child whose class name ends in 'Attention'); "
            f"its children are {', '.join(type(child).__name__ for child in layer.children()) or 'none'}"
        )

    @classmethod
    def query_projection_of(cls, layer: nn.Module) -> nn.Module:
        """
        The projection that makes queries and nothing else, ``[..., D]`` to ``[..., H d]``.

        Raises
        ------
        ModelError
            The layer has none that can be told, or makes queries, keys and values in one.
        """
        attention = cls.attention_of(layer)
        for name in ("q_proj", "query", "wq"):
            if isinstance(child := getattr(attention, name, None), nn.Module):
                return child
        raise ModelError(
            f"{type(attention).__name__} has no query projection of its own (q_proj, query or wq); "
            f"its children are {', '.join(name for name, _ in attention.named_children()) or 'none'}"
        )

    @classmethod
    def output_projection_of(cls, layer: nn.Module) -> nn.Module:
        """
        The projection that attention heads go through together, ``[..., H d]`` to ``[..., D]``.

        Raises
        ------
        ModelError
            The layer has none that can be told.
        """
        attention = cls.attention_of(layer)
        for name in ("o_proj", "out_proj", "dense", "wo"):
            if isinstance(child := getattr(attention, name, None), nn.Module):
                return child
        raise ModelError(
            f"{type(attention).__name__} has no output projection (o_proj, out_proj, dense or wo); "
            f"its children are {', '.join(name for name, _ in attention.named_children()) or 'none'}"
        )

    @staticmethod
    def attention_norm_of(layer: nn.Module) -> nn.Module:
        """
        The norm that states go through before self-attention.

        Raises
        ------
        ModelError
            The layer has none that can be told (one that norms after attention, say).
        """
        for name in ("input_layernorm", "layer_norm1", "norm1", "layernorm_before", "ln_1", "attention_norm"):
            if isinstance(child := getattr(layer, name, None), nn.Module):
                return child
        raise ModelError(
            f"layer {type(layer).__name__} holds no norm before its attention (input_layernorm, norm1 ...); "
            f"its children are {', '.join(name for name, _ in layer.named_children()) or 'none'}"
        )

    @staticmethod
    def mlp_norm_of(layer: nn.Module) -> nn.Module:
        """
        The norm that states go through before the feed-forward module.

        Raises
        ------
        ModelError
            The layer has none that can be told.
        """
        for name in ("post_attention_layernorm", "layer_norm2", "norm2", "layernorm_after", "ln_2", "ffn_norm"):
            if isinstance(child := getattr(layer, name, None), nn.Module):
                return child
        raise ModelError(
            f"layer {type(layer).__name__} holds no norm before its feed-forward module (layer_norm2, norm2 ...); "
            f"its children are {', '.join(name for name, _ in layer.named_children()) or 'none'}"
        )

    @staticmethod
    def mlp_of(layer: nn.Module) -> nn.Module:
        """
        The feed-forward module of a decoder or vision layer.

        Raises
        ------
        ModelError
            The layer has none that can be told.
        """
        for name in ("mlp", "feed_forward", "ffn"):
            if isinstance(child := getattr(layer, name, None), nn.Module):
                return child
        raise ModelError(
            f"layer {type(layer).__name__} holds no feed-forward module (mlp, feed_forward or ffn); "
            f"its children are {', '.join(name for name, _ in layer.named_children()) or 'none'}"
        )
