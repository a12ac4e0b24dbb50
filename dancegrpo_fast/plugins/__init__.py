"""What other training engines load by name; importing this package imports none of them.

`flow_factory`, `verl_omni` and `unirl`: docs/plugins.md has the line of configuration for each.
"""
