"""How far predicted bytes may lie from measured ones."""

# Of all live tensors: what the trainer's own loop keeps a call longer than it has to is not predicted.
PREDICTED_BYTES = 0.02
