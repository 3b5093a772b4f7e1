"""A federation in Flower's simulation engine, whose clients take noisy steps by Opacus on a PEFT model.

    PYTHON_OF_ITS_ENVIRONMENT with_flower.py FOLDER THREADS

Each round sends the trained arrays to every client; each takes one step of DP-SGD (per-example clipping by hooks, noise) and
sends its arrays back for FedAvg. An actor (a process of Ray's) keeps its model between messages.
"""

import logging
import os
import sys

import flower_client
from flwr.app import ArrayRecord, ConfigRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch_client import Losses, Work, serve


class AllOrNothing(FedAvg):
    """FedAvg that ends the program where a client failed: it would go on with the others, and look fast."""

    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        if len(replies) < self.min_available_nodes or any(reply.has_error() for reply in replies):
            print("a client of Flower's failed", file=sys.stderr, flush=True)
            os._exit(1)  # this is a thread of the engine's
        return super().aggregate_train(server_round, replies)


def server_app(folder):
    """The ServerApp of the benchmark's `folder`."""
    app = ServerApp()

    @app.main()
    def main(grid, context):
        work = Work(folder)
        first = ArrayRecord({name: part.detach() for name, part in Losses(work).trained().items()})
        count = work.setting["clients"]
        strategy = AllOrNothing(fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=count)

        def run(rounds, noise):
            config = ConfigRecord({"noise": noise})
            arrays = strategy.start(grid, first, num_rounds=rounds, train_config=config).arrays
            return arrays.to_torch_state_dict()

        serve(work, run)

    return app


if __name__ == "__main__":
    folder, threads = sys.argv[1], int(sys.argv[2])
    logging.getLogger("flwr").setLevel(logging.WARNING)
    resources = {"num_cpus": threads, "num_gpus": 0.0}
    run_simulation(
        server_app(folder),
        flower_client.app(folder, threads),
        Work(folder).setting["clients"],
        backend_config={
            "client_resources": resources,
            "init_args": {"log_to_driver": False, "num_cpus": len(os.sched_getaffinity(0))},
        },
    )
