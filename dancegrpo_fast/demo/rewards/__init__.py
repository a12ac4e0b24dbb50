"""Rewards of the demos."""
