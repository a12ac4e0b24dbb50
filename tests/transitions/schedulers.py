"""diffusers' schedulers, ready to step."""

from functools import partial


def scheduler(name: str, steps: int = 4, **config):
    """Of 0 steps: before it is told how many."""
    import diffusers

    made = getattr(diffusers, name)(**config)
    if steps:
        made.set_timesteps(steps)
    return made


flow_scheduler = partial(scheduler, "FlowMatchEulerDiscreteScheduler")
ddim_scheduler = partial(scheduler, "DDIMScheduler", clip_sample=False)
