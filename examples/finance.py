"""Five banks fine-tune one classifier, each under its own epsilon: a page to read and run, cell by cell or whole.

    python examples/finance.py

Takes about two minutes on two cores; writes `finance.png` and the adapter into `finance_adapter/`.
"""

# %% The frozen model that all banks start from, and its tokenizer
from dplora_jax import Federation, FederationConfig, Lora, Optimizer, Privacy, Schedule, evaluation, losses, models
from dplora_jax.data import encoding, sources

model, params = models.from_pretrained("all-MiniLM-L6-v2", num_labels=3)
tokenizer = models.load_tokenizer("all-MiniLM-L6-v2")

# %% Records: synthetic headlines with sentiment. Each bank has every fifth; the test set is public
corpus = sources.load(sources.Source("finance_demo"))
train, test = (encoding.classification(tokenizer, part, max_length=24) for part in (corpus.train, corpus.test))
banks = [{name: array[k::5] for name, array in train.items()} for k in range(5)]

# %% What it will cost each bank, before anything runs
config = FederationConfig(
    lora=Lora(rank=4, last_layers=3, freeze_a=True),
    privacy=Privacy(epsilon=8.0, delta=1e-5, clip_norm=1.0),
    schedule=Schedule(clients=5, rounds=20, expected_batch_size=128.0),
    optimizer=Optimizer(client_lr=1.0, head_lr=8.0),
)
federation = Federation(model, params, losses.classification, config)
print(federation.plan([len(bank["labels"]) for bank in banks]))

# %% Train. Without a workdir nothing is kept; with one, the same line resumes
rounds = []
for round in federation.fit(banks, evaluate=evaluation.on(test)):
    rounds.append(round)
    print(
        f"round {round.number:2}  epsilon {max(round.epsilon):.3f}", *(f"{k} {v:.3f}" for k, v in round.metrics.items())
    )
federation.save("finance_adapter")

# %% Utility and privacy by round
import matplotlib.pyplot as plt  # noqa: E402

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
scored = [round for round in rounds if "accuracy" in round.metrics]
left.plot([r.number for r in scored], [r.metrics["accuracy"] for r in scored], marker="o")
left.set(xlabel="round", ylabel="accuracy on the public test set")
right.plot([r.number for r in rounds], [max(r.epsilon) for r in rounds])
right.set(xlabel="round", ylabel="epsilon of the client that pays most")
figure.savefig("finance.png", dpi=150)
