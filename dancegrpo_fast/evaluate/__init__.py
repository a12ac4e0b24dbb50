"""Scores of trained or untrained weights on fixed prompts."""

from .scores import evaluate as evaluate
