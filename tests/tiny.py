"""See cl_dist.contract.tiny, which other packages use too."""

from cl_dist.contract.tiny import *  # noqa: F403
