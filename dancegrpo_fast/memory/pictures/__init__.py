"""Drawings of a plan."""
