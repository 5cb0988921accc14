"""Division of a stage's optimizer steps into epochs and rounds."""

from dataclasses import dataclass

from cl_dist.learners.base import Progress


@dataclass(frozen=True, slots=True)
class Schedule:
    """total_steps in rounds of nearly equal length, each at least min_round_steps and at least an epoch long.

    Gates anneal once per round and dev rows are scored at its end, so training always ends on a full cycle. Round r
    covers the steps floor(r * total / rounds) .. floor((r + 1) * total / rounds) - 1.
    """

    total_steps: int
    steps_per_epoch: int
    min_round_steps: int

    @property
    def num_rounds(self) -> int:
        """Number of rounds, at least one."""
        return max(1, self.total_steps // max(self.steps_per_epoch, self.min_round_steps))

    def at(self, step: int) -> Progress:
        """Return the progress at an optimizer step."""
        index = ((step + 1) * self.num_rounds - 1) // self.total_steps
        first, end = (r * self.total_steps // self.num_rounds for r in (index, index + 1))
        return Progress(step=step, total_steps=self.total_steps, round_step=step - first, round_steps=end - first)

    def ends_round(self, step: int) -> bool:
        """Return whether a step is the last of its round."""
        progress = self.at(step)
        return progress.round_step == progress.round_steps - 1
