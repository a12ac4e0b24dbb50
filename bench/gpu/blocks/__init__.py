"""The ops of transformer blocks and whole blocks at real sizes, timed on a GPU: `python -m bench.gpu.blocks`.

What `bench.blocks` counts, this measures. Sizes are its configurations; everything is bfloat16 at batch 1, with random
weights. `peers.py` has the ops as diffusers computes them, `ops.py` the cases, `pairs.py` a double-stream and a
single-stream block in a row.
"""
