"""Studies: arms x orders x seeds as runs of one folder, compared pair by pair."""

from cl_dist.study.driver import run_study
from cl_dist.study.file import Study, read_study
from cl_dist.study.results import study_document

__all__ = ["Study", "read_study", "run_study", "study_document"]
