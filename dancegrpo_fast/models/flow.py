"""Samplers of the rectified-flow families."""

from torch import Tensor

from .. import transitions
from ..config import SamplerSettings


def flow_table(sampler: SamplerSettings, sigmas: Tensor, deterministic: bool) -> transitions.TransitionTable:
    """The table that the settings ask for over `sigmas` `[T + 1]`; `deterministic` gives the ODE."""
    euler = transitions.ode(sigmas)
    if deterministic or sampler.kind == "ode":
        return euler
    builders = {"dance_sde": transitions.dance_sde, "flow_sde": transitions.flow_sde, "cps": transitions.cps}
    if sampler.kind not in builders:
        raise ValueError(f'sampler.kind: got "{sampler.kind}", want one of {[*builders, "ode"]} for a flow model')
    table = builders[sampler.kind](sigmas, sampler.eta)
    return table if sampler.window is None else transitions.mixed(table, euler, sampler.window)
