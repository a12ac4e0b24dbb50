"""What one block of a diffusion transformer moves and keeps, counted on fake tensors: `python -m bench.blocks`.

Nothing here is a time. Real configurations, bfloat16, batch 1, no weights or activations in memory.

U: one bfloat16 row `[token, C]` of the model, so bytes / (tokens C 2), with the image's and the text's tokens.

Traffic: for every operator, bytes of the tensors it reads and of those it writes. Not counted: matrix products and
attention; views, allocations. An expanded tensor is what it really stores; small parameters and rotary tables are what
they are; an operator that works in place reads and writes. No cache is assumed to keep anything between two operators.
One of our ops is one operator, its tensors once each; so is one of Inductor's kernels. What a kernel reads twice is not
seen: our norm's backward does where the sums of its parameters do not fit the registers (Wan's float32 modulation).

Launches: operators counted as above, and matrix products and attention; not views. Kernels may be more: an operator of
ours may need a second one to finish a parameter's gradient.

Saved: bytes of different storages that autograd holds after the forward, without parameters, the block's inputs (with
rotary tables and masks) and results, and tensors without a dimension of tokens (rows `[B, 6C]` of modulation).

Backward: gradients of every parameter and input, with all the additions that autograd makes; "frozen": only of inputs.

Single-stream blocks are counted in the middle of their stack: both streams come as the two parts of one tensor, and the
gradients of the parts are put together where the parts are made, unless the block takes the whole.

Operators are those that torch runs on CUDA: RMSNorm of torch is one operator each way, attention is flash attention, or
the memory-efficient one with a mask. `dancegrpo_fast/memory/trace/fake.py` says how without a GPU. For torch.compile
see `compiled.py`.
"""
