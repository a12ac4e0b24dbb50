"""Which attention a model runs, and why."""

from .choice import choose as choose
