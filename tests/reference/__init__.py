"""Naive renderings of the methods, written from their formulas: full attention matrices, Python loops, no caches."""
