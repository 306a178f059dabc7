"""Every method on every family, in every way a prompt is run; writes the support matrix of the documentation."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

import lmmhooks
from lmmhooks.engines.records import Record, record_file, write_record
from lmmhooks.family import resolve
from lmmhooks.loading import identity
from lmmhooks.prompting import answer
from tests.conformance.table import ROWS
from tests.engines.lookers import noise, without_sharing
from tests.processing import processor_of
from tests.zoo import FAMILIES, build

# A batch pads its rows, which changes the order of summation and nothing else; largest difference seen is 8e-6.
TOLERANCE = 5e-5
MODES = ("prefill", "decode", "padded batch", "two images", "beams", "sampling", "answer")
#: What makes a call of ``generate`` one of a mode, where that is not greedy search.
CALLS = {"beams": {"num_beams": 3, "do_sample": False}, "sampling": {"do_sample": True}}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Models by family; what methods would have to measure on them is on record."""

    @functools.cache
    def get(name):
        zoo = build(name)
        for method, row in ROWS.items():
            for setting, value in (row.measured(resolve(zoo.model)) if row.measured else {}).items():
                checkpoint = identity(zoo.model)
                write_record(Record(method, setting, checkpoint, value), record_file(method, setting, checkpoint))
        return zoo

    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("home")
        patch.setattr(Path, "home", lambda: home)
        yield get


def cells():
    for name, row in ROWS.items():
        for family in FAMILIES:
            yield pytest.param(name, row, family, id=f"{name}-{family}")


def test_every_method_has_a_row():
    assert set(ROWS) == set(lmmhooks.methods())


def generate(model, inputs, **kwargs):
    """New tokens and logits ``[B, steps, vocabulary]`` of four generated tokens."""
    out = model.generate(
        **inputs, max_new_tokens=4, min_new_tokens=4, output_logits=True, return_dict_in_generate=True, **kwargs
    )
    return out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.logits, dim=1)


@pytest.fixture(scope="module")
def specs(tmp_path_factory):
    """Methods as the table has them, with the files that they need."""

    @functools.cache
    def get(name):
        row = ROWS[name]
        if row.files is None:
            return row.spec
        return lmmhooks.method(row.spec, **row.files(tmp_path_factory.mktemp(name)))

    return get


@pytest.fixture
def cell(request, models, specs, support, name, row, family):
    """The wrapped model; a refusal that the table announces ends the test as passed."""
    zoo = models(family)
    spec = specs(name)
    mode = request.node.originalname.removeprefix("test_").replace("_", " ")
    if family in row.refused:
        with pytest.raises(lmmhooks.LmmhooksError, match=row.refused[family]):
            lmmhooks.wrap(zoo.model, spec)
        support.record(name, family, mode, f"refused: {row.refused[family]}")
        pytest.skip(f"refused by design: {row.refused[family]}")
    if mode in row.modes:
        with (
            lmmhooks.wrap(zoo.model, spec),
            pytest.raises(lmmhooks.LmmhooksError, match=row.modes[mode]),
        ):
            zoo.model.generate(**zoo.inputs(batch=1), **{"do_sample": False, **CALLS.get(mode, {})})
        support.record(name, family, mode, f"refused: {row.modes[mode]}")
        pytest.skip(f"refused by design: {row.modes[mode]}")
    yield zoo
    lmmhooks.unwrap(zoo.model)
    support.record(name, family, mode, "yes")


matrix = pytest.mark.parametrize(("name", "row", "family"), list(cells()))


@matrix
def test_prefill(cell, specs, name, row):
    inputs = cell.inputs(batch=1)
    with torch.no_grad():
        plain = cell.model(**inputs).logits[:, -1]
        with lmmhooks.wrap(cell.model, specs(name)):
            patched = cell.model(**inputs).logits[:, -1]
            again = cell.model(**inputs).logits[:, -1]
        after = cell.model(**inputs).logits[:, -1]
    assert torch.isfinite(patched).all()
    assert torch.equal(patched, again), "state of the first prompt reached the second"
    assert torch.equal(after, plain), "removal must be bit-identical"
    assert torch.equal(patched, plain) != (row.changes and not row.after_prompt)


@matrix
def test_decode(cell, row):
    inputs = cell.inputs(batch=1)
    plain, plain_logits = generate(cell.model, inputs, do_sample=False)
    with lmmhooks.wrap(cell.model, row.spec):
        tokens, logits = generate(cell.model, inputs, do_sample=False)
        repeated, _ = generate(cell.model, inputs, do_sample=False)
    assert torch.isfinite(logits).all()
    assert torch.equal(tokens, repeated)
    if row.after_prompt:
        assert not torch.equal(logits, plain_logits)
    if not row.changes:
        assert torch.equal(logits, plain_logits)
        assert torch.equal(tokens, plain)


@matrix
def test_padded_batch(cell, row):
    inputs = cell.inputs(batch=3)
    assert not inputs["attention_mask"].all(), "rows of equal length would not be padded"
    with lmmhooks.wrap(cell.model, row.spec):
        tokens, logits = generate(cell.model, inputs, do_sample=False)
        for i in range(3):
            one, one_logits = generate(cell.model, cell.row(inputs, i), do_sample=False)
            torch.testing.assert_close(logits[i : i + 1], one_logits, atol=TOLERANCE, rtol=0)
            assert torch.equal(tokens[i : i + 1], one)


@matrix
def test_two_images(cell, row):
    inputs = cell.inputs(batch=2, images=[2, 1])
    with lmmhooks.wrap(cell.model, row.spec):
        tokens, logits = generate(cell.model, inputs, do_sample=False)
        one, one_logits = generate(cell.model, cell.row(inputs, 0), do_sample=False)
    torch.testing.assert_close(logits[:1], one_logits, atol=TOLERANCE, rtol=0)
    assert torch.equal(tokens[:1], one)


@matrix
def test_beams(cell, row):
    inputs = cell.inputs(batch=2)
    kwargs = {"num_beams": 3, "do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4}
    with torch.no_grad():
        plain = cell.model.generate(**inputs, **kwargs)
        with lmmhooks.wrap(cell.model, row.spec):
            tokens = cell.model.generate(**inputs, **kwargs)
            one = cell.model.generate(**cell.row(inputs, 1), **kwargs)
    assert torch.equal(tokens[1:, -4:], one[:, -4:])
    if not row.changes:
        assert torch.equal(tokens, plain)


@matrix
def test_sampling(cell, row):
    inputs = cell.inputs(batch=2)

    def sample():
        torch.manual_seed(3)
        return generate(cell.model, inputs, do_sample=True, top_k=0)[0]

    plain = sample()
    with lmmhooks.wrap(cell.model, row.spec):
        tokens = sample()
        assert torch.equal(tokens, sample())
    if not row.changes:
        assert torch.equal(tokens, plain)


@pytest.mark.parametrize(("name", "row", "family"), [cell for cell in cells() if cell.values[1].answer is not None])
def test_answer(cell, specs, name, row, family, monkeypatch):
    """Passes that share what they have in common answer about the same pictures as passes that read everything."""
    processor = processor_of(family)
    image, prompt = noise(60, 40), "What is it?"
    kwargs = {"max_new_tokens": 4, "do_sample": False}

    def answered():
        with lmmhooks.wrap(cell.model, specs(name), processor=processor) as patch:
            texts = [patch.answer(image, prompt, **kwargs, **row.answer) for _ in range(2)]
            return texts, [one.tobytes() for one in getattr(patch._runtime.answering, "looked_at", [])]

    plain = answer(cell.model, processor, image, prompt, **kwargs)
    shared, pictures = answered()
    assert shared[0] == shared[1], "what the first answer left behind reached the second"
    without_sharing(monkeypatch)
    assert answered() == (shared, pictures)
    assert answer(cell.model, processor, image, prompt, **kwargs) == plain
    if name != "mvp":
        assert pictures


@pytest.mark.parametrize("name", ROWS)
def test_settings_survive_being_written_down(name):
    method = lmmhooks.methods.resolve(ROWS[name].spec)
    assert lmmhooks.methods.resolve(method.spec()) == method
    assert lmmhooks.methods.resolve({method.id: method.settings()}) == method
    assert type(method).paper
    for setting in method.hyperparameters().values():
        assert setting.help, f"{name}: {setting.name} is not documented"
