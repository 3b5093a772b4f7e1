"""What the peers' clients have in common, in PyTorch: the model that the benchmark wrote down, and its rows.

The programs beside this file run in environments of their own, which have neither JAX nor this project: `FOLDER/setting.json`
says what to do, `base/` and `adapter/` hold the weights, and `rows.npz` holds all clients' rows and which of them each client
takes in which round.
"""

import json
import pathlib
import sys
import time

import numpy as np
import peft
import safetensors.torch
import torch
import transformers
from torch.nn import functional


class Work:
    """The folder that the benchmark wrote."""

    def __init__(self, folder):
        self.folder = pathlib.Path(folder)
        self.setting = json.loads((self.folder / "setting.json").read_text())
        with np.load(self.folder / "rows.npz") as arrays:
            self.rows = {
                name: torch.from_numpy(arrays[name]).long() for name in ("input_ids", "labels") if name in arrays
            }
            self.picked, self.starts = arrays["picked"], arrays["starts"]

    def batch(self, round, client):
        """The rows {name: [B, ...]} that `client` takes in `round`, counted from 0; after the last comes the first again."""
        index = (round % self.setting["rounds"]) * self.setting["clients"] + client
        picked = torch.from_numpy(self.picked[self.starts[index] : self.starts[index + 1]])
        return {name: array[picked] for name, array in self.rows.items()}


class Losses(torch.nn.Module):
    """(rows) -> the loss of each row [B]: the mean cross-entropy of its next tokens, or that of its label behind the mean of the
    last layer's states."""

    def __init__(self, work):
        super().__init__()
        base, self.normalize, self.mixed = work.folder / "base", work.setting["normalize"], work.setting["mixed"]
        if work.setting["classes"]:
            base = transformers.AutoModel.from_pretrained(base, add_pooling_layer=False, dtype=torch.float32)
        else:
            base = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
            base.config.use_cache = False
        for part in base.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0
        self.adapted = peft.PeftModel.from_pretrained(base, work.folder / "adapter", is_trainable=True)
        if work.setting["classes"]:
            self.head = torch.nn.Linear(base.config.hidden_size, work.setting["classes"])
            self.head.load_state_dict(safetensors.torch.load_file(work.folder / "head.safetensors"))
        self.train()

    def forward(self, input_ids, labels=None):
        with torch.autocast("cpu", torch.bfloat16, enabled=self.mixed):
            return self.losses(input_ids, labels)

    def losses(self, input_ids, labels):
        if labels is not None:
            states = self.adapted(input_ids=input_ids).last_hidden_state
            pooled = states.mean(1)
            pooled = functional.normalize(pooled) if self.normalize else pooled
            return functional.cross_entropy(self.head(pooled), labels, reduction="none")
        logits = self.adapted(input_ids=input_ids).logits[:, :-1]
        flat = functional.cross_entropy(logits.flatten(0, 1), input_ids[:, 1:].flatten(), reduction="none")
        return flat.view(len(input_ids), -1).mean(1)

    def trained(self):
        """{name: parameter} of what is trained."""
        return {name: part for name, part in self.named_parameters() if part.requires_grad}


def serve(work, run):
    """For each line "ROUNDS NOISE" of standard input, answer with the seconds that `run(rounds, noise)` took, in a line that
    begins with "seconds". What it returns, {name: array} of what was trained, is written down, which takes no part of them."""
    for line in sys.stdin:
        rounds, noise = line.split()
        start = time.perf_counter()
        trained = run(int(rounds), float(noise))
        seconds = time.perf_counter() - start
        tensors = {name: torch.as_tensor(value).contiguous() for name, value in trained.items()}
        safetensors.torch.save_file(tensors, work.folder / f"{pathlib.Path(sys.argv[0]).stem}.safetensors")
        print(f"seconds {seconds}", flush=True)
