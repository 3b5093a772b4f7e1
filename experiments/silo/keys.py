"""Make a party's keys and its public card."""

from absl import flags

from dplora_jax.config import replace
from dplora_jax.errors import InputError
from dplora_jax.silos import keys
from experiments import cli
from experiments.silo import options


def main(arguments):
    """Run the command line -> exit code."""
    values = flags.FlagValues()
    flags.DEFINE_string("name", None, "this party's name: letters, digits and underscores", flag_values=values)
    flags.DEFINE_integer(
        "records", None, "how many records it has, a public number; default: counted in --data_dir", flag_values=values
    )
    _, values, workdir = options.read("keys", arguments, values, "silo")
    if not values.name:
        raise InputError("--name is missing: give this party's name.")
    records = values.records
    if records is None:
        from dplora_jax.finetuning import parties

        with cli.speaking_of_flags():
            records = parties.own_records(replace(cli.raw(values), workdir=str(workdir))).count
    card = keys.create(workdir, values.name, records)
    print(f"{card['name']} has {records} records. Send {workdir / keys.CARD} to the coordinator.")
    print(f"Keep {workdir / 'private'} here, and give {workdir / 'relay'} to the relay's user.")
    return 0
