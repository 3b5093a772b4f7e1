"""How an engine reaches the coordinator's office: the embedded mailbox, or a Unix socket for a process of another engine."""

from dplora_jax.silos import frames, keys
from dplora_jax.silos import mailbox as mailboxes

POLL = 10.0  # seconds that a request is waited for before an empty answer


def mailbox(plan, office, address, folder):
    """The mailbox of `plan` at `address`, as a context -> its port; `folder` has the coordinator's TLS key and certificate."""
    sites = [site["certificate"] for site in plan.sites]
    return mailboxes.serving(
        office, address, folder / keys.TLS_KEY, folder / keys.CERTIFICATE, sites, plan.reply_size()
    )


def socket(plan, office, path):
    """The office of `plan` on the Unix socket `path`, for an engine's process on this machine, as a context. It asks with a
    site's number and the reply of that site, or none; the answer is the request that waits, or none yet."""

    def answer(data):
        if len(data) < frames.SITE.size or (site := frames.SITE.unpack_from(data)[0]) >= len(plan.sites):
            return b""
        return office.exchange(site, data[frames.SITE.size :], POLL)

    threads = 2 * len(plan.sites)  # each site's question waits for its answer in one
    return frames.listening(path, answer, frames.SITE.size + plan.reply_size(), threads=threads)
