"""Memory that a prompt takes while a decoder reads it, from sizes alone, and how many prompts a device has room for."""

from __future__ import annotations

from dataclasses import dataclass

from lmmhooks.cost.decoder import DecoderShape

__all__ = ["PromptMemory", "prompt_memory"]


@dataclass(frozen=True)
class PromptMemory:
    """
    Bytes beyond the weights at the worst moment of reading a batch of prompts.

    Attributes
    ----------
    cache
        Keys and values of all rows.
    activations
        What lives at the same time inside one layer, in all rows that are read at once.
    """

    cache: int
    activations: int

    @property
    def total(self) -> int:
        """Cache and activations."""
        return self.cache + self.activations

    def batch_that_fits(self, batch: int, available: int) -> int:
        """
        How many prompts such as these there is room for.

        Parameters
        ----------
        batch
            Prompts that the figures are of, 1 or more.
        available
            Bytes.
        """
        return batch * available // self.total


def prompt_memory(
    shape: DecoderShape, rows: int, length: int, rows_at_once: int, bytes_per_element: int = 2
) -> PromptMemory:
    """
    Estimate what reading a batch of prompts takes.

    A lower bound: fused attention, no copies of the cache, nothing but the decoder. The worst moment of a layer is its
    feed-forward part: its inner products are there, beside embeddings, residual stream and normed states.

    Parameters
    ----------
    shape
        Sizes of the decoder.
    rows
        Rows whose keys and values are kept.
    length
        Tokens per row, padding included.
    rows_at_once
        Rows in one forward.
    bytes_per_element
        Of states and of the cache.

    Raises
    ------
    ValueError
        A number of rows or tokens that is not positive.
    """
    if min(rows, length, rows_at_once) < 1:
        raise ValueError(f"{rows} rows of {length} tokens, {rows_at_once} at once: these have to be positive")
    inner = (3 if shape.gated_ffn else 2) * shape.ffn_width
    return PromptMemory(
        cache=rows * length * shape.kv_bytes_per_token(bytes_per_element),
        activations=rows_at_once * length * (3 * shape.width + inner) * bytes_per_element,
    )
