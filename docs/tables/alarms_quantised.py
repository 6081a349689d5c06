"""False alarms on the right kernels of the zoo whose operands are quantised, from what benchmarks/alarms.py recorded."""

import alarms


def render() -> str:
    """As the table of the other kernels."""
    return alarms.render(alarms.MEASUREMENT.with_name("alarms-quantised.json"))
