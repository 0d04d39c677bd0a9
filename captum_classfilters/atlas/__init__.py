"""A static site about a model's class filters; needs the extra ``atlas``."""

from captum_classfilters.atlas.build import atlas

__all__ = ["atlas"]
