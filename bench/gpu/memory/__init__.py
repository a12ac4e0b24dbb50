"""The planner's predictions held to a GPU: `bench_memory.py`.

`models.py`: a training call of real blocks at real width, predicted on fake tensors and measured as
`torch.cuda.max_memory_allocated` beside what was allocated before; a call that is thrown away comes first, so that
workspaces of libraries are there already. `kernels.py`: which attention backends run with and without a mask, which
kernels they are, and what they keep and take.
"""
