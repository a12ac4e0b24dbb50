"""The learning rate as a function of the update's number, with no state of its own."""

import math

from ..recipe import TrainSettings


def learning_rate(train: TrainSettings, update: int) -> float:
    """Of an update of the run, which are counted from 0 and as planned, whether or not their work is skipped.

    The first `warmup_updates` rise in equal steps, the last of them to `train.learning_rate`. Those after it fall so
    that the update after the run's last one would have 0; their values are those of the schedules in transformers and
    diffusers.
    """
    factor, left = 1.0, (train.updates - update) / max(1, train.updates - train.warmup_updates)
    if update < train.warmup_updates:
        factor = (update + 1) / train.warmup_updates
    elif train.schedule == "linear":
        factor = left
    elif train.schedule == "cosine":
        factor = 0.5 * (1 - math.cos(math.pi * left))
    return train.learning_rate * factor
