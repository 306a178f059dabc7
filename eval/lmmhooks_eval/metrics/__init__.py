"""Parsers and metrics that several tasks share; each module is pure and imports no model library."""
