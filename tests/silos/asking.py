"""The coordinator's side of one site, for tests that ask what no coordinator would."""

from dplora_jax.privacy.ledger import Ledger
from dplora_jax.silos import keys, messages
from dplora_jax.silos.messages import Kind, Request
from tests.silos import small_silos

EVERYONE, NOBODY = frozenset(range(3)), frozenset()


class Asker:
    """The coordinator's side of one site: requests as the tests want them."""

    def __init__(self, made, site):
        self.made, self.site, self.statement, self.signatures = made, site, made.plan.digest, {}

    def request(self, number=1, attempt=0, key=None, **fields):
        """A request's bytes: the right one for a first round, but for what is given."""
        nothing, every = bytes(messages.SIGNATURE), range(3)
        request = Request(
            Kind.ROUND, self.made.plan.digest, number, attempt, EVERYONE, NOBODY if number == 1 else EVERYONE, max(number - 1, 0),
            self.statement, tuple(self.site.epoch if k == self.site.number else bytes(16) for k in every),
            tuple(self.signatures.get(k, nothing) for k in every), self.made.start,
        )  # fmt: skip
        return messages.pack_request(request._replace(**fields), key or self.made.key)

    def ask(self, *args, **fields):
        """The Reply to such a request."""
        return self.reply(self.request(*args, **fields))

    def reply(self, data):
        answer = self.site.handle(data)
        assert messages.signed(answer, self.made.plan.site_keys[self.site.number])
        return messages.unpack_reply(answer, self.made.plan.numbers)

    def go_on(self, adapter, number=1):
        """After a round: what all sites signed of it."""
        self.statement = messages.statement(self.made.plan.digest, number, adapter, self.statement)
        self.signatures = {k: keys_of(self.made, k).sign(self.statement) for k in range(3)}


def keys_of(made, number):
    return keys.load(made.folder / small_silos.NAMES[number]).sign


def charged(made, number=0):
    return Ledger(made.folder / small_silos.NAMES[number] / "privacy_ledger.jsonl", mend=False).charged_rounds()
