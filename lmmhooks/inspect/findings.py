"""A diagnosis in words: what was found, and just as plainly what was looked for and is not there."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from lmmhooks.inspect.report import SampleSinks, SinkToken

__all__ = ["describe", "layer_ranges"]


def describe(sample: SampleSinks, attention_judged: bool) -> tuple[str, ...]:
    """
    Sentences on one sample.

    Parameters
    ----------
    sample
        Everything but its sentences.
    attention_judged
        Whether any key is seen by enough probe rows for its attention to count.
    """
    found = [_text_sinks(sample), _visual_sinks(sample), _outliers(sample), _disagreement(sample), _magnets(sample)]
    found += [_heads_on_image(sample), _single_heads(sample)]
    if not attention_judged:
        found.append(
            f"attention is no evidence here: {sample.probe_rows} probe rows are too few; ask a longer question, or "
            "read all rows"
        )
    return tuple(sentence for sentence in found if sentence)


def layer_ranges(layers: Iterable[int]) -> str:
    """Layers as people write them: ``"2 to 5, 8"``."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in runs)


def _text_sinks(sample: SampleSinks) -> str:
    by_position = _positions(sample, lambda token: token.image is None)
    if not by_position:
        return "no text sinks: no text token is one in any layer that was judged"
    parts = [
        f"{position}{'' if token.text is None else f' {token.text!r}'} (layers {layer_ranges(layers)})"
        for position, (token, layers) in by_position.items()
    ]
    more = f" and {len(parts) - 8} more" if len(parts) > 8 else ""
    return f"text sinks at position{'s' if len(parts) > 1 else ''} {', '.join(parts[:8])}{more}"


def _visual_sinks(sample: SampleSinks) -> str:
    if not sample.segments["image"]:
        return "no image in this prompt"
    by_position = _positions(sample, lambda token: token.image is not None)
    if not by_position:
        return "no visual sinks: no visual token is one in any layer that was judged"
    layers = [layer for layer in sample.layers if layer.visual_sink_share is not None]
    shares = [layer.visual_sink_share or 0.0 for layer in layers]
    return (
        f"{len(by_position)} of {sample.segments['image']} visual tokens are sinks in layers "
        f"{layer_ranges(layer.layer for layer in layers)}; there they take {sum(shares) / len(shares):.0%} of the "
        "attention on the image"
    )


def _outliers(sample: SampleSinks) -> str:
    if not sample.segments["image"]:
        return ""
    if sample.images is None:
        return "vision features were computed outside the model, so their norms are not known"
    outliers = [outlier for image in sample.images for outlier in image.outliers]
    if not outliers:
        return "no outliers among the vision features"
    both = sum(bool(outlier.layers) for outlier in outliers)
    return (
        f"visual tokens with vision features of outlying norm: {len(outliers)} (largest "
        f"{max(outlier.norm for outlier in outliers):.1f}); of these also sinks in the decoder: {both or 'none'}"
    )


def _disagreement(sample: SampleSinks) -> str:
    judged = [layer for layer in sample.layers if layer.judged]
    parts = []
    for label, meaning in (
        ("unconfirmed", "look like sinks by their hidden state, with nothing to confirm it"),
        ("attention only", "receive much attention, with nothing in their hidden state"),
    ):
        positions = {token.position for layer in judged for token in layer.tokens if token.label == label}
        if positions:
            parts.append(f"{len(positions)} positions {meaning}")
    return f"the detectors disagree: {'; '.join(parts)}" if parts else ""


def _magnets(sample: SampleSinks) -> str:
    if not sample.magnets:
        return "no stop-word magnets"
    names = [repr(magnet.text) if magnet.text is not None else str(magnet.position) for magnet in sample.magnets]
    return f"stop-word magnets: {', '.join(names)}"


def _heads_on_image(sample: SampleSinks) -> str:
    looking = [layer.image_centric_heads for layer in sample.layers if layer.image_centric_heads is not None]
    return "no head looks at the image beyond its sinks" if looking and not any(looking) else ""


def _single_heads(sample: SampleSinks) -> str:
    """Sinks of a few heads do not show in the mean over heads."""
    if not sample.head_received:
        return "no head concentrates on one key"
    strongest = sorted(sample.head_received.items(), key=lambda item: -item[1])[:3]
    named = ", ".join(f"position {position} in {share:.1%} of all heads" for position, share in strongest)
    return f"keys that single heads concentrate on: {len(sample.head_received)} (most: {named})"


def _positions(sample: SampleSinks, wanted: Callable[[SinkToken], bool]) -> dict[int, tuple[SinkToken, list[int]]]:
    """Sinks of one kind: by position, its first token and the layers in which it is one."""
    found: dict[int, tuple[SinkToken, list[int]]] = {}
    for layer in sample.layers:
        for token in layer.sinks:
            if wanted(token):
                found.setdefault(token.position, (token, []))[1].append(layer.layer)
    return dict(sorted(found.items()))
