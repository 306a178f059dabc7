"""Everything that differs between the supported transformers versions, in one place."""

from __future__ import annotations
