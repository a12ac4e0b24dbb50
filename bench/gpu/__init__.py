"""The gate on a machine with a GPU: `bench/gpu_gate.sh`, or `python -m bench.gpu`; see README.md beside this folder."""
