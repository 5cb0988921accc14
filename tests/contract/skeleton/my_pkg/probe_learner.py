"""The learner of the probe: imported by workers."""

from cl_dist.learners.base import Learner, Loss
from cl_dist.models.classifier import Classifier, cross_entropy, freeze


class Probe(Learner):
    """Trains one task's head."""

    def build(self, backbone, task):
        freeze(backbone)
        self.model = Classifier(backbone, self.pooling)
        for count in self.num_labels:
            self.model.add_head(count)
        return self.model

    def start_task(self, task, tasks):
        for number, head in enumerate(self.model.heads):
            head.requires_grad_(number == task)
        self.activate(task)

    def loss(self, model, batch, progress):
        self.model.task = len(self.num_labels) - 1
        return Loss({"ce": cross_entropy(self.config.scale * model(batch), batch)})

    def activate(self, task, without=None):
        self.model.task = task
