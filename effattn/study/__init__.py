"""Studies: how far approximations are from exact attention, what they cost, and what theory says.

`effattn study NAME` runs one. Nothing here is imported before a study is asked for.
"""
