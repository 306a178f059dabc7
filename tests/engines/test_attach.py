"""The record of attachments on a toy network: order, arguments, reversal, survival of failures."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lmmhooks.engines.attach import Attachments


class Add(nn.Module):
    def forward(self, x, amount=1.0):
        return x + amount


class Toy(nn.Module):
    scale = 3.0

    def __init__(self):
        super().__init__()
        self.first, self.second = Add(), Add()

    def forward(self, x):
        return self.second(self.first(x), amount=10.0)


def multiply(factor):
    return lambda module, args, kwargs: ((args[0] * factor, *args[1:]), kwargs)


def add(amount):
    return lambda module, args, kwargs, output: output + amount


@pytest.fixture
def toy():
    return Toy()


ONE = torch.ones(1)


def test_pre_hooks_run_in_the_order_of_attachment(toy):
    record = Attachments()
    record.pre_hook(toy.first, multiply(2), "double")
    record.pre_hook(toy.first, lambda m, a, k: ((a[0] + 1,), k), "increment")
    assert toy(ONE) == (1 * 2 + 1) + 1 + 10
    record.pre_hook(toy.first, multiply(100), "first of all", first=True)
    assert toy(ONE) == (100 * 2 + 1) + 1 + 10


def test_hooks_see_and_change_keyword_arguments(toy):
    record = Attachments()
    record.pre_hook(toy.second, lambda m, a, k: (a, {**k, "amount": k["amount"] * 2}), "twice the amount")
    assert toy(ONE) == 22
    record.undo()
    assert toy(ONE) == 12


def test_forward_hooks_change_the_output_and_always_runs_after_errors(toy):
    record, seen = Attachments(), []
    record.hook(toy.first, add(5), "plus five")
    record.hook(toy, lambda m, a, k, output: seen.append(output), "watch", always=True)
    assert toy(ONE) == 17
    record.pre_hook(toy.second, lambda m, a, k: 1 / 0, "fail")
    with pytest.raises(ZeroDivisionError):
        toy(ONE)
    assert len(seen) == 2


def test_a_forward_hook_may_come_before_those_that_are_there(toy):
    record, seen = Attachments(), []
    record.hook(toy.first, lambda m, a, k, output: seen.append(output), "watch")
    record.hook(toy.first, add(5), "plus five")
    toy(ONE)
    record.hook(toy.first, add(100), "plus hundred", first=True)
    toy(ONE)
    assert [float(output) for output in seen] == [2, 102]


def test_attributes_come_back_as_they_were(toy):
    record = Attachments()
    toy.own = 1
    record.attribute(toy, "own", 2, "own")
    record.attribute(toy, "scale", 4.0, "scale")
    assert (toy.own, toy.scale) == (2, 4.0)
    record.undo()
    assert (toy.own, toy.scale) == (1, 3.0)
    assert "scale" not in vars(toy), "a class attribute must not be left as an instance attribute"


def test_what_was_set_twice_returns_to_the_first_value(toy):
    record = Attachments()
    record.attribute(toy, "scale", 1, "scale")
    record.attribute(toy, "scale", 2, "scale")
    record.undo()
    assert toy.scale == 3.0


def test_undo_is_idempotent_and_describes_what_is_there(toy):
    record = Attachments()
    record.pre_hook(toy, multiply(2), "double")
    record.attribute(toy, "scale", 1, "scale")
    assert record.described == ["forward pre-hook double", "attribute scale"]
    assert len(record) == 2
    record.undo()
    record.undo()
    assert record.described == []
    assert not toy._forward_pre_hooks


def test_a_step_that_fails_does_not_keep_the_others_attached(toy):
    record = Attachments()
    record.pre_hook(toy, multiply(2), "double")
    record._record(lambda: 1 / 0, "broken")
    record.pre_hook(toy.first, multiply(2), "double")
    with pytest.raises(ZeroDivisionError):
        record.undo()
    assert not toy._forward_pre_hooks
    assert not toy.first._forward_pre_hooks


def test_two_records_on_one_module_leave_each_other_alone(toy):
    one, two = Attachments(), Attachments()
    one.pre_hook(toy.first, multiply(2), "one")
    two.pre_hook(toy.first, multiply(3), "two")
    one.undo()
    assert toy(ONE) == 3 + 1 + 10
    two.undo()
    assert toy(ONE) == 12
