"""See cl_dist.contract.ranks, which other packages use too."""

from cl_dist.contract.ranks import *  # noqa: F403
