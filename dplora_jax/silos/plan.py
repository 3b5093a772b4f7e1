"""The plan: all that is public of a federation between parties, written once, signed by the coordinator, checked and approved by
every site. Its digest is in every message.

No JAX: the coordinator, and whoever checks it, can do without.
"""

import hashlib
import math
import pathlib

from dplora_jax import config_checks
from dplora_jax.config import METRICS, RESULT, RunConfig, deciding, from_flat, to_flat
from dplora_jax.errors import InputError
from dplora_jax.federation import calibration, ledger_checks, silo_checks, trust, workdir_files
from dplora_jax.files import plain, to_json
from dplora_jax.json_files import Unfit, anything, hexadecimal, list_of, load, optional, record, text, whole
from dplora_jax.privacy import accounting
from dplora_jax.privacy.chain import replace_durably
from dplora_jax.silos import keys, messages, server

FILE, START, APPROVAL = "plan.json", "start.npy", "approval.json"
FORMAT = 1
# Of a party's own house: where its table lies, how that is written, and what is shown and measured there.
LOCAL = (
    "data_dir", "test_data", "encoding", "separator", "text_column", "label_column", "prompt_column", "answer_column",
    "benchmarks", "benchmarks_dir", "workdir", "auto", "train_records", "test_records", "test_fraction",
)  # fmt: skip
DIGEST = hexadecimal(64, 64)
BODY = record({
    "format": whole(FORMAT, FORMAT),
    "config": record({}, {name: check for name, check in workdir_files.FLAGS.items() if name not in LOCAL}),
    "model": record({}, {}, text()),
    "layout": list_of(record({"name": text(), "shape": list_of(whole(1, 1 << 40), 8, 1)}), 4096, 1),
    "start": DIGEST,
    "bits": optional(whole(1, 31)),
    "sites": list_of(keys.CARD_SCHEMA, messages.MOST_SITES, 2),
    "coordinator": keys.CARD_SCHEMA,
    "federation": workdir_files.FEDERATION,
    "measured": optional(record({}, {}, anything)),
})  # fmt: skip
SCHEMA = record({"plan": BODY, "signature": hexadecimal(128, 128)})
APPROVED = record({"site": text(), "plan": DIGEST, "signature": hexadecimal(128, 128)})


class Plan:
    """A plan as it was read: `config` (a RunConfig without what is a party's own), `sites` and `coordinator` (cards), each site's
    `mechanisms`, the `layout` of an adapter, and the `digest` (32 bytes) of it all."""

    def __init__(self, body):
        self.body = body
        self.digest = hashlib.sha256(canonical(body)).digest()
        self.sites, self.coordinator, self.layout = body["sites"], body["coordinator"], body["layout"]
        self.config = config_checks.settled(from_flat(body["config"]))
        self.sizes = [site["records"] for site in self.sites]
        self.mechanisms = calibration.written(
            workdir_files.with_defaults(body["config"]) | {"federation": body["federation"]}
        )
        self.mode = trust.mode(self.config)
        self.numbers = sum(math.prod(part["shape"]) for part in self.layout)
        self.bits, self.start = body["bits"], body["start"]
        self.coordinator_key = keys.verifier(self.coordinator["ed25519"])
        self.site_keys = [keys.verifier(site["ed25519"]) for site in self.sites]

    @property
    def least(self):
        """How many sites a round needs: more than half of all, so that no two groups go on apart, and where uploads are masked
        as many as `survivors`."""
        return max(len(self.sites) // 2 + 1, self.config.privacy.survivors if self.mode.masked else 0)

    @property
    def names(self):
        """The sites' names, in the order of their numbers."""
        return [site["name"] for site in self.sites]

    def number(self, name):
        """The number of the site of that name; InputError."""
        if name not in self.names:
            raise InputError(f"the plan has no site {name}: it is for {', '.join(self.names)}.")
        return self.names.index(name)

    def server(self):
        """The Server that this plan asks for."""
        head = sum(math.prod(part["shape"]) for part in self.layout if part["name"].startswith("head"))
        return server.Server(self.config, self.sizes, self.mechanisms, head, self.bits)

    def request_size(self):
        """The bytes of a request."""
        return messages.request_size(len(self.sites), self.numbers)

    def reply_size(self):
        """The most bytes of a reply."""
        return messages.reply_sizes(self.numbers)[1]


def public_config(config):
    """{flag: value} of what `config` says of all parties alike."""
    flat, shared = plain(to_flat(config)), {*deciding(RESULT, METRICS), "eval_every"} - {*LOCAL}
    return {name: value for name, value in flat.items() if name in shared}


def canonical(body):
    """The bytes whose SHA-256 is the plan's digest: the same however the file is laid out."""
    return to_json(body, sort_keys=True, separators=(",", ":")).encode()


def write(folder, body, key):
    """Sign the plan `body` (a dict of BODY) by the coordinator's `key`, write it into `folder` and read it again -> Plan."""
    path = pathlib.Path(folder) / FILE
    signature = key.sign(b"dplora_jax plan" + hashlib.sha256(canonical(body)).digest())
    replace_durably(path, to_json({"plan": body, "signature": signature.hex()}, indent=1) + "\n")
    return read(path)


def read(path):
    """The Plan in a file that another party sent: whole, signed, and one that this program can run. Raises InputError."""
    try:
        document = load(pathlib.Path(path), SCHEMA)
        body = document["plan"]
        for card in (*body["sites"], body["coordinator"]):
            keys.check_card(card)
        plan = Plan(body)
        signature = bytes.fromhex(document["signature"])
        if not messages.verified(plan.coordinator_key, signature, b"dplora_jax plan" + plan.digest):
            raise Unfit("it is not signed by the coordinator whose key it names, or was changed since")
        _check(plan)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: give the plan.json that the coordinator sent.") from None
    except Unfit as error:
        raise InputError(f"{path} is no plan that can be run: {error}.") from None
    return plan


def _check(plan):
    """Unfit or InputError where a plan does not fit itself."""
    rows, count = plan.body["federation"]["clients"], len(plan.sites)
    names = plan.names
    if len(set(names)) < count or len({site[key] for site in plan.sites for key in ("ed25519", "x25519")}) < 2 * count:
        raise Unfit("two sites have one name or one key")
    if plan.config.schedule.clients != count or [row["records"] for row in rows] != plan.sizes:
        raise Unfit("its sites are not the clients that its noise is for")
    config_checks.refuse(plan.config)
    silo_checks.check(plan.config)
    server.check(plan.config)
    if plan.mode.masked != (plan.bits is not None):
        raise Unfit("its grid of integers does not fit its trust")


def own_epsilon(plan, number):
    """What site `number` will have spent after all planned rounds, recomputed from the configuration and the sizes alone. Raises
    InputError where the plan's own sampling or noise is another's."""
    decided = calibration.mechanisms(plan.config, plan.sizes)
    for site, (said, follows) in enumerate(zip(plan.mechanisms, decided, strict=True)):
        if other := ledger_checks.differ(said, follows):
            raise InputError(
                f"the plan's {', '.join(other)} of {plan.names[site]} do not follow from its configuration and sizes."
            )
    if not plan.mode.private or plan.config.privacy.seed is not None:  # noise that anyone can draw again
        return math.inf
    steps = plan.config.schedule.rounds * plan.mode.steps_per_round(plan.config)
    return accounting.epsilon(plan.mechanisms[number], steps, plan.config.privacy.delta)


def approve(folder, plan, name, key):
    """Write the site's signed approval of `plan` into `folder` -> its path."""
    path = pathlib.Path(folder) / APPROVAL
    signature = key.sign(b"dplora_jax approval" + plan.digest)
    replace_durably(
        path, to_json({"site": name, "plan": plan.digest.hex(), "signature": signature.hex()}, indent=1) + "\n"
    )
    return path


def approved(path, plan):
    """The number of the site that approved `plan` by the file at `path`; InputError where none did."""
    try:
        document = load(pathlib.Path(path), APPROVED)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: check the plan first, which approves it.") from None
    except Unfit as error:
        raise InputError(f"{path} is no approval: {error}.") from None
    number, signature = plan.number(document["site"]), bytes.fromhex(document["signature"])
    if document["plan"] != plan.digest.hex() or not messages.verified(
        plan.site_keys[number], signature, b"dplora_jax approval" + plan.digest
    ):
        raise InputError(f"{path} does not approve this plan: {document['site']} has to check it anew.")
    return number


def config_of(plan, own=None):
    """The RunConfig of a party of `plan`, with what is its `own` {flag: value}."""
    flat = {name: value for name, value in to_flat(RunConfig()).items() if name in LOCAL}
    return config_checks.settled(from_flat(plan.body["config"] | flat | (own or {})))
