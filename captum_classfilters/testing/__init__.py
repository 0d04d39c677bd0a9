"""Networks whose class filters are known, to test methods of finding them."""

from captum_classfilters.testing.planted import planted_network, recovery

__all__ = ["planted_network", "recovery"]
