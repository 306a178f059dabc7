"""Evaluation harness of lmmhooks: tasks, metrics, runs and reports."""
