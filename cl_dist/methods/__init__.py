"""The methods: one explicit registry."""

from cl_dist.methods import adapter, ctr, ewc, finetune, hat, lamol, lifelong_embedding, lora, rational_lamol, replay
from cl_dist.methods.base import Method

METHODS: dict[str, Method] = {
    "ctr": ctr.METHOD,
    "lamol": lamol.LAMOL,
    "lamol_real": lamol.LAMOL_REAL,
    "rational_lamol": rational_lamol.METHOD,
    "hat": hat.METHOD,
    "adapter": adapter.METHOD,
    "lora": lora.METHOD,
    "ewc": ewc.METHOD,
    "replay": replay.METHOD,
    "lifelong_embedding": lifelong_embedding.METHOD,
    "sequential": finetune.SEQUENTIAL,
    "individual": finetune.INDIVIDUAL,
    "joint": finetune.JOINT,
}
