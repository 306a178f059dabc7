"""One prompt answered by a model as it is and under methods: texts, probabilities, where it looks, what it costs."""

from __future__ import annotations

from lmmhooks.comparison.result import BASELINE, Comparison, Difference, Run, Token
from lmmhooks.comparison.run import compare
from lmmhooks.comparison.trace import Candidate, Trace

__all__ = ["BASELINE", "Candidate", "Comparison", "Difference", "Run", "Token", "Trace", "compare"]
