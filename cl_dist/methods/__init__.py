"""The methods: one explicit registry."""

from cl_dist.methods import ctr, finetune
from cl_dist.methods.base import Method

METHODS: dict[str, Method] = {
    "ctr": ctr.METHOD,
    "sequential": finetune.SEQUENTIAL,
    "individual": finetune.INDIVIDUAL,
    "joint": finetune.JOINT,
}
