"""Networks whose class filters are known, to test methods of finding them."""

from captum_classfilters.testing.planted import planted_network, recovery
from captum_classfilters.testing.trained import shipped_networks, trained_network

__all__ = ["planted_network", "recovery", "shipped_networks", "trained_network"]
