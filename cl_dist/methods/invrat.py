"""Settings of InvRat, which learns the words of a text that decide its label, for rows without marked rationales.

Its players are in models/invrat.py. A Train stage per restart; the restart with the highest dev accuracy is used.
"""

from pydantic import Field

from cl_dist.config import Section
from cl_dist.stage import TrainConfig


class InvratTrain(TrainConfig):
    """How InvRat's players are trained."""

    epochs: int = Field(20, gt=0)
    lr: float = Field(1e-3, gt=0)
    global_batch: int = Field(64, gt=0)
    max_length: int = Field(300, gt=2)
    min_round_steps: int = Field(10, gt=0)


class InvratConfig(Section):
    """Settings of InvRat. It gives what environments share; a hint that holds in one of them only is none."""

    size: int = Field(100, gt=0)
    """Units of each player's GRU, per direction."""
    share: float = Field(0.2, gt=0, lt=1)
    """Share of a text's tokens that a rationale should have."""
    share_weight: float = Field(1.0, ge=0)
    """Weight of the deviation from that share."""
    breaks_weight: float = Field(5.0, ge=0)
    """Weight of the changes between selected and not selected: higher, and rationales are fewer and longer spans."""
    gap_weight: float = Field(10.0, ge=0)
    """Weight of what knowing the environment gains."""
    environments: int = Field(2, gt=1)
    """How many there are: values of `tasks.<id>.environment`, or else parts of equal size, by how surprising a word
    classifier finds a row's label."""
    restarts: int = Field(3, gt=0)
    """Players are trained so often, from other seeds."""
    train: InvratTrain = InvratTrain()
