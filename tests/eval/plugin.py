"""A task as a third party would write it."""

from __future__ import annotations

from tests.eval.test_plan import make_task

TASK = make_task()
