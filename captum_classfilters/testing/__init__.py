"""Networks whose class filters are known, to test methods of finding them."""

from captum_classfilters.testing.planted import PlantedNetwork, Recovery, planted_network, recovery

__all__ = ["PlantedNetwork", "Recovery", "planted_network", "recovery"]
