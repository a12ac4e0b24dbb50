"""Memory: what is predicted against what real models take, and what `auto` chooses: `python -m bench.memory`.

`table`: small real diffusers models of every family that the planner knows, on this machine's CPU, three ways.

- predicted: the whole model on fake tensors, built on `meta`; no weight and no activation exists.
- planned (bfloat16): the planner's composition from models of one or two blocks of each kind, as it is made for models
  that fit on no machine.
- measured: the same model with random weights runs. Two accounts are kept of one run, neither by the code that
  predicts: a ledger of the storages that live after each operator, by weak references to torch's own storages, and
  the running total of torch's CPU allocator, which also sees what operators allocate within.

Of a training call (forward and backward, gradients there before): bytes at the peak, and bytes that live from the
forward to the backward without the output. Of a rollout call (no gradients): bytes at the peak. Peaks are of all that
lives: weights, gradients, inputs, activations. `activations_off` is the deviation without what was there before the
call. With inputs of blocks in host memory the whole is compared with the traced model, as both are on one CPU, and the
rest with the planner, which leaves them out.

`auto` is what the planner chooses where it is given half of the bytes that full checkpointing saves.

`rows`: figures of an earlier count of published models at real size, and the planner's beside them (`earlier.py`).

`scenarios`: what `--checkpointing auto` does with the settings in `scenarios.py`, each in a process of its own.

`swaps`: how many blocks `auto` swaps on small cards, and what that costs.

`margins`: what others saw allocators and processes hold beside tensors (`evidence/`), and what the planner takes.

`atlas`: every known model at its usual sizes (`usual.py`) on every size of card, for `docs/atlas.md`; only by name.
"""
