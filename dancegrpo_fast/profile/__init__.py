"""Iterations measured beside what was predicted of them."""

from .profiler import profile as profile
from .profiler import profile_recipe as profile_recipe
