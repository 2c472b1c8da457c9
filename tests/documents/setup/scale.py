"""What the page takes as given: a process group, here of one process, a model, tasks and the loop around them."""

import torch.distributed as dist

from tests.continual.tiny import logits, peft_model
from tests.continual.tiny import train as train_tiny

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
model = peft_model()
tasks = {"news": 1, "mail": 2}


def train(wrapped, loader):
    train_tiny(wrapped, loader, steps=1)


def evaluate(model):
    logits(model)
