"""`dancegrpo-fast run` and `compat.patched`: functions of a script replaced by those of `compat`.

| file | what |
|---|---|
| `process`, `settings` | one process of `run`, from its start to its report; what it was asked for |
| `imports`, `source`, `children` | where known functions are defined: modules, source text, child processes |
| `scan`, `launchers`, `loading` | `--dry-run`; torchrun and its like; `--accelerate` |
| `known`, `roles` | the functions that are known, and what their parameters and results are |
| `replaced`, `dispatch` | what stands in for a function, and where its calls go |
| `probe`, `small`, `apart` | original and ours compared on small tensors, unnoticed by the script |
| `audit`, `verdict` | whether the first update starts where it should |
| `meter`, `report` | calls, times, host reads; the table at the end |
| `patched` | the same for modules that are imported already |

Importing these imports no torch before a known function is called, but for `dispatch` and what it needs.
"""
