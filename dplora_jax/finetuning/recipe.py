"""Settings that do well, from what is public: how many records each client has, how many clients, epsilon, and the objective.

`auto` fills with them whatever fields are not given, and says what it chose. Why, in short (docs/results/recipe.md):

- Expected batches of a fifth of a client's records: less noise on the mean than smaller batches at the same epsilon; larger
  ones cost time and gain little.
- Thirty rounds (ten or twenty of a language model), one local step each. At a fixed epsilon, noise grows as the root of the
  rounds, so the noise in where training ends depends on learning rate times rounds (the way gone) and hardly on either alone.
  Rates are constant, but those of label words fall to a tenth.
- That way is as long as the noise allows, x^2 / (x^2 + HALF^2) of the full one for x = n_k epsilon sqrt(K): noise falls as 1 / x,
  and with signal S and noise N / x a quadratic loss is least at S^2 / (S^2 + (N / x)^2) of the way to its optimum. A head on
  centred features takes x / (x + HEAD_HALF) of a longer one, which fits what was measured.
- Rank 4 with A frozen (FFA-LoRA): half the noisy coordinates, and no product of two noises.
- A head's features are centred and scaled by public text, where there is some: of what noise leaves, more then tells texts apart.
- A language model that says labels trains a core between bases from public text (docs/core.md), on a way x / (x + WORDS_HALF).
- The clip norm is near the gradients' own norms or below: a head's on pooled features are near 1 at first (more once scaled), a
  core's near 0.8; a language model's, of a mean over tokens, near a tenth.
- Momentum 0.9 at the server and an average of the released adapters, both free. That momentum takes ten rounds to reach its
  stride: label words, whose rates fall, have 0.5.
"""

import math
import statistics
import warnings

from dplora_jax.errors import InputError, InputWarning

SHARE = 0.2  # of a client's records, in an expected batch
BATCHES = 8, 256  # the least and the most of that
HALF = 1700  # n_k epsilon sqrt(K), where half the way is best
HEAD_HALF = 19_000  # the same of a head on centred features, which can use all the way that there is
UNIT_ROWS = 4  # of a person's rows, in a step: how many there are is private, and more cost compute alone
COMMON = {
    "rounds": 30, "local_steps": 1, "rank": 4, "alpha": 8.0, "freeze_a": True, "server_momentum": 0.9, "ema": 0.8,
}  # fmt: skip
CENTRED = "classifier with `feature_norm`"
WORDS = "language model by label words"
WORDS_HALF = 4_000  # the same of a core between public bases
CLASSIFIER = {"clip_norm": 1.0, "client_lr": 1.0, "head_lr": 8.0, "last_layers": 3}
BY_OBJECTIVE = {
    "classifier": CLASSIFIER,
    CENTRED: CLASSIFIER | {"head_lr": 3.0, "feature_norm": 8.0},
    "language_model": {
        "clip_norm": 0.1,
        "client_lr": 48.0,
        "head_lr": None,
        "last_layers": 6,
        "rounds": 10,
        "ema": 0.5,
    },
    WORDS: {
        "clip_norm": 0.5,
        "client_lr": 64.0,
        "lr_decay": 0.1,
        "server_momentum": 0.5,
        "ema": 0.5,
        "head_lr": None,
        "last_layers": 12,
        "rounds": 20,
        "core": True,
        "freeze_a": False,
        "rank": 16,
        "alpha": 16.0,
        "targets": ("q", "o", "up", "gate"),
    },
}


def chosen(sizes, clients, epsilon, objective):
    """{flag: value} for `clients` clients of `sizes` records each, at `epsilon` (None or inf: without privacy).

    >>> chosen([775] * 5, 5, 8.0, "classifier")["expected_batch_size"]
    155.0
    """
    records = statistics.median(sizes)
    least, most = BATCHES
    recipe = COMMON | BY_OBJECTIVE[objective]
    recipe["expected_batch_size"] = float(min(max(round(SHARE * records), least), most, min(sizes)))
    if epsilon is not None and math.isfinite(epsilon):
        x = records * epsilon * math.sqrt(clients)
        way = x / (x + WORDS_HALF) if objective == WORDS else 1 / (1 + (HALF / x) ** 2)
        ways = {"client_lr": way, "head_lr": x / (x + HEAD_HALF) if objective == CENTRED else way}
        recipe |= {name: float(f"{recipe[name] * ways[name]:.3g}") for name in ways if recipe[name] is not None}
    return recipe


def for_run(config, given):
    """{field: value} that the recipe sets in `config` (a RunConfig as given), but for the fields that `given` names."""
    from dplora_jax.data import partition, tasks
    from dplora_jax.federation import held_out, methods, trust
    from dplora_jax.finetuning import dealing, objectives, public_text
    from dplora_jax.models import pretrained

    if config.data.partition == partition.FOLDERS:
        raise InputError(
            "`auto` cannot be used with partition=folders, where no process knows how many records each client has: give "
            "`expected_batch_size` and the learning rates."
        )
    mode = trust.mode(config)
    if not mode.public_uploads:
        raise InputError(
            f"`auto` cannot be used with trust={config.privacy.trust}: it knows what to set for trust=local and none."
        )
    epsilon, sigma = config.privacy.epsilon, config.privacy.noise_multiplier
    if sigma is not None and mode.private:
        raise InputError("`auto` needs `epsilon`: give it in place of `noise_multiplier`.")
    dealt = dealing.deal(config)
    sizes = [part.count for part in dealing.by_client(*dealt.read(range(config.schedule.clients)))]
    sizes = held_out.training(config, sizes)
    private = epsilon if mode.private else None
    kind = objectives.kind(config, dealt.corpus.task)
    refused = {refusal.field for refusal in methods.BY_NAME[config.aggregation.method].refuses}
    public = len(dealt.corpus.test.texts) if dealt.corpus.test else 0
    if kind == objectives.CLASSIFIER and pretrained.bidirectional(config.base.name):
        free = public >= public_text.ENOUGH and not given & {"head_lr", "clip_norm"}  # rates fit one of the two ways
        if config.base.feature_norm if "feature_norm" in given else free:
            kind = CENTRED
    if kind == objectives.LANGUAGE_MODEL and dealt.corpus.task.kind == tasks.LABELS:
        why = _why_no_core(config, given, refused, public, public_text.ENOUGH)
        if why is None:
            kind = WORDS
        else:
            warnings.warn(
                f"`auto` trains no `core` here, since {why}. What it sets was tuned on answers, and learned little more of "
                "labels than which of them is common (docs/core.md).",
                InputWarning,
                stacklevel=1,
            )
    recipe = chosen(sizes, config.schedule.clients, private, kind)
    if config.privacy.unit_column:
        recipe["unit_rows"] = UNIT_ROWS
    recipe["last_layers"] = min(recipe["last_layers"], pretrained.depth(config.base.name))
    if "targets" in recipe and "targets" not in given:  # not every family has all of them
        known = pretrained.matrices(config.base.name)
        recipe["targets"] = tuple(name for name in recipe["targets"] if name in known)
    if "freeze_a" in refused:
        del recipe["freeze_a"]
    return {name: value for name, value in recipe.items() if name not in given}


def _why_no_core(config, given, refused, public, least):
    """Why no core is to learn label words, in words; None where one is. `refused` are the fields that the aggregation cannot
    have; there are `public` test records to measure bases on, and must be `least`."""
    if "core" in given:
        return None if config.lora.core else "core=false is given"
    if "core" in refused:
        return f"aggregation={config.aggregation.method} has none"
    if public < least:
        return f"there are fewer than {least} public test records to measure it by"
    own = sorted(given & {"freeze_a", "ranks", "client_lr", "clip_norm"})  # each fits an adapter, or a core
    if own:
        named = " and ".join(f"`{name}`" for name in own)
        return f"what is right for {named} is another with a core (give `core` with it, or leave it out)"
    return None
