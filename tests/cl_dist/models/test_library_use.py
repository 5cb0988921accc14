"""The plugins without the rest of this project: a BertModel, an ordinary loop, a file of a few kilobytes."""

from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import BertConfig, BertModel

from cl_dist.models.config import PluginShape
from cl_dist.models.gates import slope
from cl_dist.models.plugin import CtrClassifier

STEPS = 80
BERT = BertConfig(vocab_size=30, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
SHAPE = PluginShape(tsm_size=48, filters=8, capsule_mid=8)


def bert() -> BertModel:
    torch.manual_seed(0)
    return BertModel(BERT)


def test_plugins_learn_a_task_in_a_plain_bert_and_are_saved_alone(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        backbone = bert()
        before = {name: parameter.clone() for name, parameter in backbone.state_dict().items()}
        ids = torch.randint(0, 30, (32, 6))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        label = (ids[:, 0] >= 15).long()

        model = CtrClassifier(backbone, SHAPE)
        model.add_task(num_labels=2)
        model.start_task(0)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
        losses = []
        for step in range(STEPS):
            model.context.slope = slope(step, STEPS, SHAPE.s_max)
            loss = F.cross_entropy(model(batch), label)
            (loss + 0.1 * model.sparsity()).backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        model.finish_task()
        model.context.slope = None
        assert losses[-1] < 0.5 * losses[0]

        path = tmp_path / "plugins.safetensors"
        model.save_plugins(path)
        fresh = CtrClassifier(bert(), SHAPE)
        fresh.add_task(num_labels=2)
        fresh.load_plugins(path)
        with torch.no_grad():
            answers = model.eval()(batch)
            torch.testing.assert_close(fresh.eval()(batch), answers, rtol=0, atol=0)
        assert (answers.argmax(-1) == label).float().mean() > 0.9

    still = {name.replace(".base.", "."): value for name, value in model.backbone.state_dict().items()}
    frozen = [name for name in before if name in still]
    assert len(frozen) > 20
    assert all(torch.equal(still[name], before[name]) for name in frozen)
