"""A client of with_flower.py: one noisy step by Opacus on a PEFT model. Ray's actors import it by name."""

import functools

import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch_client import Losses, Work


@functools.cache
def learner(folder, threads):
    """(work, the model under Opacus' hooks, its plain module) of this actor."""
    torch.set_num_threads(threads)
    work = Work(folder)
    model = Losses(work)
    return work, GradSampleModule(model, loss_reduction="sum", strict=False), model


def app(folder, threads):
    """The ClientApp of the benchmark's `folder`, with so many threads in each actor."""
    made = ClientApp()

    @made.train()
    def train(message, context):
        work, hooked, model = learner(folder, threads)
        trained, setting, config = model.trained(), work.setting, message.content["config"]
        for name, value in message.content["arrays"].to_torch_state_dict().items():
            trained[name].data.copy_(value)
        optimizer = DPOptimizer(
            torch.optim.SGD(trained.values(), lr=setting["rate"]),
            noise_multiplier=config["noise"],
            max_grad_norm=setting["clip_norm"],
            expected_batch_size=setting["batch"],
        )
        batch = work.batch(config["server-round"] - 1, context.node_config["partition-id"])
        optimizer.zero_grad(set_to_none=True)
        if len(batch["input_ids"]):
            hooked(**batch).sum().backward()
        else:  # nothing was drawn: noise alone
            for part in trained.values():
                part.grad_sample = torch.zeros(0, *part.shape)
        optimizer.step()
        content = {
            "arrays": ArrayRecord({name: part.detach() for name, part in trained.items()}),
            "metrics": MetricRecord({"num-examples": 1}),
        }
        return Message(content=RecordDict(content), reply_to=message)

    return made
