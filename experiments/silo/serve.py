"""A site: answer the coordinator's requests on a Unix socket, until the run ends."""

import hashlib
import pathlib
import signal
import threading

from absl import flags

from dplora_jax import guard, peft, private_files
from dplora_jax.errors import InputError
from dplora_jax.federation import final_adapter, program
from dplora_jax.federation.silo import Silo
from dplora_jax.models import pretrained
from dplora_jax.privacy import secrets
from dplora_jax.privacy.chain import replace_durably
from dplora_jax.privacy.ledger import FILE, Ledger
from dplora_jax.silos import frames, plan, vectors
from dplora_jax.silos.site import Site, forget
from experiments import report
from experiments.run import STOPPED, model_card
from experiments.silo import options, party

LINGER = 2.0  # seconds for which the end is confirmed again, should the answer be lost on its way


def main(arguments):
    """Run the command line -> exit code."""
    values = flags.FlagValues()
    flags.DEFINE_string("socket", None, "Unix socket to listen on; default: WORKDIR/site.sock", flag_values=values)
    flags.DEFINE_string(
        "relay_group", None, "group that may reach the socket, where the relay is another user", flag_values=values
    )
    path, values, workdir = options.read("serve", arguments, values, "silo")
    made = options.planned(path)
    if (workdir / FILE).exists() and Ledger(workdir / FILE, mend=False).ended:
        secrets.destroy(workdir / "private")  # what a kill at the very end left
        forget(workdir / "private")
        print(f"This site's part is finished. Report: {report.write(workdir)}")
        return 0
    if values.relay_group and (
        values.socket is None or workdir.resolve() in pathlib.Path(values.socket).resolve().parents
    ):
        raise InputError(f"--relay_group needs a --socket outside {workdir}, into which no other user can look.")
    approved = plan.approved(workdir / plan.APPROVAL, made)
    own = party.opened(made, values, workdir)
    if approved != own.number:
        raise InputError(f"{workdir / plan.APPROVAL} is another site's: check the plan here.")
    with private_files.reasons_in(workdir):
        return serve(made, own, workdir, values.socket or workdir / "site.sock", values.relay_group)


def serve(made, own, workdir, socket, group):
    """Answer until the run ends or SIGTERM -> exit code."""
    base, config, name = own.base, own.config, made.names[own.number]
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    with Silo(
        base.model, base.params, base.objective.loss, config, client=own.number, records=own.rows, sizes=made.sizes,
        mechanisms=made.mechanisms, workdir=workdir, description=own.about,
    ) as silo:  # fmt: skip
        site = Site(
            made, own.number, own.keys, silo, workdir, report=guard.show,
            finish=lambda adapter: save(workdir, own, vectors.tree(adapter, silo.template)),
        )  # fmt: skip
        with frames.listening(socket, site.handle, made.request_size(), group):
            print(
                f"{name} answers on {socket}, from round {silo.done + 1} of plan {made.digest.hex()[:16]}", flush=True
            )
            while not stopped.wait(0.2) and not site.ended.is_set():
                _tell(made, name, site, silo)
            if site.ended.is_set():
                stopped.wait(LINGER)
            site.close()  # what was charged is kept before this process ends
        _tell(made, name, site, silo)
    if not site.ended.is_set():
        return STOPPED
    report.write(workdir)
    print(f"The run has ended. Adapter: {workdir / 'adapter'}  Report: {workdir / 'report.html'}")
    return 0


def _tell(made, name, site, silo):
    """Say what each upload since the last time was for: who was asked, and which adapters this site was sent."""
    while site.views:
        number, peers, statement = site.views.pop(0)
        asked = ", ".join(made.names[peer] for peer in peers)
        print(
            f"{name}: round {number}, asked {asked}; epsilon {silo.epsilon:.4f}; adapters so far {statement[:32]}",
            flush=True,
        )


def save(workdir, own, adapter):
    """Write the released adapter in PEFT's format, its head for features as the base model makes them."""
    print(f"The released adapter is {hashlib.sha256(vectors.flat(adapter)).hexdigest()[:32]}: all sites have the same.")
    base, config = own.base, own.config
    _, params, lora_config = program.adapter(config, base.model, base.params)
    folder, whole = workdir / "adapter", final_adapter.whole(params, adapter)
    peft.save(folder, base.model, whole, lora_config, pretrained.hub_id(config.base.name))
    line = (
        f"Made by {config.schedule.clients} parties that share no machine, in {config.schedule.rounds} planned rounds."
    )
    labels = list(base.corpus.label_names)
    replace_durably(
        folder / "README.md", model_card.adapter_note(base.model, line, labels, own.about.get("label_reading", ""))
    )
