"""A plan of three sites of the tiny classifier, its sites and its coordinator, all in one process."""

import contextlib
import threading

from dplora_jax import losses
from dplora_jax.config import RunConfig, replace
from dplora_jax.federation.silo import Silo
from dplora_jax.privacy.ledger import Ledger
from dplora_jax.silos import draft, keys, plan
from dplora_jax.silos.coordinator import Coordinator
from dplora_jax.silos.office import Office
from dplora_jax.silos.site import Site
from tests.federation import small_federation as small

NAMES = "north", "south", "east"
SIZES = [16, 16, 16]
MASKED = {"trust": "distributed", "noise": "hardened", "survivors": 2, "colluding": 1}
MODES = {"local": {}, "masked": MASKED}
PROGRAMS = {}
ONE = threading.Lock()  # one process: its checkpoints are not for several threads


def shards():
    return [small.rows(size, seed) for seed, size in enumerate(SIZES)]


def charges(made):
    """How many rounds each site of the Federation `made` has paid for."""
    paths = [made.folder / name / "privacy_ledger.jsonl" for name in NAMES]
    return [Ledger(path, mend=False).charged_rounds() if path.exists() else 0 for path in paths]


class Federation:
    """Keys, plan and start of a federation in `folder`; `fields` are the configuration's."""

    def __init__(self, folder, **fields):
        self.folder, values = folder, small.FIELDS | {"rounds": 3} | fields
        cards = [keys.create(folder / name, name, size) for name, size in zip(NAMES, SIZES, strict=True)]
        card = keys.create(folder / "coordinator", "coordinator", 0)
        made = replace(RunConfig(), **values)
        body, self.start = draft.draft(made, *small.model(), cards, card, {"model.safetensors": "0" * 64})
        self.key = keys.load(folder / "coordinator").sign
        self.plan = plan.write(folder / "coordinator", body, self.key)
        self.config = plan.config_of(self.plan)

    @contextlib.contextmanager
    def site(self, number, **options):
        """The Site of that number, on what its folder keeps."""
        folder = self.folder / NAMES[number]
        shared = PROGRAMS.setdefault(replace(self.config, seed=None), {})
        with Silo(
            *small.model(), losses.classification, self.config, client=number, records=shards()[number], sizes=SIZES,
            mechanisms=self.plan.mechanisms, workdir=folder, programs=shared, description=self.plan.body["federation"],
        ) as silo:  # fmt: skip
            yield Site(self.plan, number, keys.load(folder), silo, folder, **options)

    @contextlib.contextmanager
    def sites(self):
        """All three, {number: Site}."""
        with contextlib.ExitStack() as stack:
            yield {number: stack.enter_context(self.site(number)) for number in range(len(NAMES))}

    def coordinator(self, office=None, **options):
        """A Coordinator on what its folder keeps."""
        return Coordinator(
            self.plan, self.key, office or Office(len(NAMES)), self.folder / "coordinator", self.start,
            say=lambda text: None, **options,
        )  # fmt: skip

    @contextlib.contextmanager
    def engine(self, office, sites, carry=lambda site, request, answer: answer(request), alone=True):
        """Threads that carry requests to `sites` {number: Site} and replies back, through `carry`; one at a time if `alone`."""
        stop = threading.Event()

        def relay(number):
            reply = b""
            while not stop.is_set():
                request = office.exchange(number, reply, 0.05)
                with ONE if alone else contextlib.nullcontext():
                    reply = carry(number, request, sites[number].handle) if request else b""

        threads = [threading.Thread(target=relay, args=(number,), daemon=True) for number in sites]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            stop.set()
            for thread in threads:
                thread.join()

    def run(self, carry=None, patience=120, without=None, alone=True, **options):
        """The Coordinator after all rounds, with every site in this process."""
        office = Office(len(NAMES))
        with self.sites() as sites, self.engine(office, sites, *([carry] if carry else []), alone=alone):
            made = self.coordinator(office, **options)
            made.run(patience, without)
        return made
