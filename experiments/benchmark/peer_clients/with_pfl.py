"""A federation in pfl-research's simulated backend with its local differential privacy, on a PEFT model.

    PYTHON_OF_ITS_ENVIRONMENT with_pfl.py FOLDER THREADS

Its local privacy clips a client's whole update and adds noise to it: no gradient of a record is ever clipped, which is less work
and another guarantee. Without noise, and with a bound that clips nothing, a round comes to the same.
"""

import dataclasses
import sys

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam import NNTrainHyperParams
from pfl.model.pytorch import PyTorchModel
from pfl.privacy.gaussian_mechanism import GaussianMechanism
from torch_client import Losses, Work, serve


class Learner(Losses):
    """The losses as pfl wants them: a sum over rows, over the expected batch size."""

    def __init__(self, work):
        super().__init__(work)
        self.batch_size = work.setting["batch"]

    def loss(self, *rows):
        if not len(rows[0]):  # nothing was drawn
            return sum(0 * part.sum() for part in self.trained().values())
        return self(*rows).sum() / self.batch_size

    def metrics(self, *rows):
        return {}


class Once(FederatedAveraging):
    """Rounds without evaluation: pfl evaluates a client's rows before and after its steps in every round that is due, the first
    one among them."""

    def simulate_one_user(self, model, user_dataset, central_context):
        return super().simulate_one_user(model, user_dataset, dataclasses.replace(central_context, do_evaluation=False))


def main(folder, threads):
    torch.set_num_threads(threads)
    work = Work(folder)
    setting, learner = work.setting, Learner(work)
    first = {name: part.detach().clone() for name, part in learner.trained().items()}

    def run(rounds, noise):
        for name, part in learner.trained().items():
            part.data.copy_(first[name])
        turns = iter([(round, client) for round in range(rounds) for client in range(setting["clients"])])
        data = FederatedDataset(
            lambda turn: Dataset(tuple(work.batch(*turn).values()), user_id=str(turn[1])), lambda: next(turns)
        )
        bound = setting["rate"] * setting["clip_norm"] if noise else 1e9
        local = GaussianMechanism(bound, noise)
        model = PyTorchModel(
            learner,
            lambda parameters, lr: torch.optim.SGD([p for p in parameters if p.requires_grad], lr=lr),
            torch.optim.SGD(learner.trained().values(), lr=1.0),
        )
        Once().run(
            NNAlgorithmParams(rounds, rounds + 1, setting["clients"], 0),
            SimulatedBackend(data, data, [local]),
            model,
            NNTrainHyperParams(local_num_epochs=1, local_learning_rate=setting["rate"], local_batch_size=None),
            send_metrics_to_platform=False,
        )
        return {name: part.detach() for name, part in learner.trained().items()}

    serve(work, run)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
