"""What kernels cost by their machine code, without a GPU: `python -m bench.machine`.

Every kernel is compiled as a launch compiles it, and its first and last warps are followed through the disassembly with
the launch's arguments: loops as often as they run, branches where they go. From that come the instructions issued and
those of each unit, and with registers, shared memory and the tensors' sizes the time that issue, units and bytes take
at the least on each GPU. None of it is a measurement: caches, latencies and the order of programs are not in it.
"""
