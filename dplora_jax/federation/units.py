"""Units of several rows, a person's or a document's: sampled, clipped and accounted as one record (user-level sampling of Charles
et al. 2024, arXiv 2407.07737, section 3.2).

Letters: B units of a batch, G rows that a unit brings to a step at most, U units and N rows of a client or of a device.
"""

import dataclasses
import functools
from typing import NamedTuple

import numpy as np

from dplora_jax import losses
from dplora_jax.data.records import UNIT
from dplora_jax.errors import InputError
from dplora_jax.federation import client, held_out, processes
from dplora_jax.losses import BROUGHT
from dplora_jax.privacy import sampling

SPANS = "spans"  # of the records on a device: each unit's first row, and how many it has, [U, 2]


@dataclasses.dataclass(frozen=True)
class UnitsOnDevice(client.OnDevice):
    """Batches of units, from rows on the device, in the place of `client.OnDevice`: leaves [B, G, ...], and `brought` [B, G].

    Each unit that joins brings `rows` of its rows, drawn anew in each step, or all that it has; the rest of its place is filled
    up with its own first row, which counts for nothing. No shape follows how many rows a unit has.
    """

    rows: int
    keys = ("sampling", "rows")

    def pick(self, local, data, client_, keys, index):
        """What step `index` takes: the rows of each unit [B, G] and which of them there are; weights [B] of the units."""
        units, weights = client.sample(local, client_, keys, index)
        spans = data[SPANS][client_.offset + units]
        places, brought = sampling.subsets(keys["rows"], index, spans[:, 1], self.rows)
        return {"row": spans[:, :1] + places, BROUGHT: brought}, weights

    def gather(self, data, picked):
        """The batch (dict of [B, G, ...]) of what was picked."""
        rows = {name: array[picked["row"]] for name, array in data.items() if name != SPANS}
        return rows | {BROUGHT: picked[BROUGHT]}


class Rows(NamedTuple):
    """The rows of clients' units: `spans` [n_k, 2] int32 of each client (the first row, counted within the client, and how many),
    None for one that another process holds; `counts`, each client's rows (0 for one held elsewhere)."""

    spans: list
    counts: list

    def spans_from(self, starts):
        """`spans`, each client's rows being counted from `starts` (a list of whole numbers) on; empty for one held elsewhere."""
        nothing = np.zeros((0, 2), np.int32)
        return [
            nothing if spans is None else spans + np.array([start, 0], np.int32)
            for spans, start in zip(self.spans, starts, strict=True)
        ]

    def room(self, each):
        """How many rows any device holds at most, `each` consecutive clients to a device; processes tell each other that much."""
        own = max(sum(self.counts[first : first + each]) for first in range(0, len(self.counts), each))
        return max(processes.gather(own))


@dataclasses.dataclass(frozen=True)
class RowEach:
    """How records lie in rows: each is one row."""

    batches = client.ON_DEVICE

    def loss(self, of_rows):
        """The loss of records, `of_rows(model, params)` being that of rows."""
        return of_rows

    def tokens(self, length):
        """The tokens of a record, of rows of `length` tokens."""
        return length

    def most_rows(self, records):
        """The most rows that so many records may have, a public number; None where there is none."""
        return records

    def whole(self, records):
        """Records of one row (dict of [N, ...]) as their loss takes them, with as many rows of the same as they may bring."""
        return records

    def spread(self, records):
        """The same as a client's records, for `arranged`."""
        return records

    def on_host(self, rows, clients):
        """What `batches` picks from on the host, where a row is counted within its client, and the `clients` (`client.Client` of
        [K']) that find their picks there."""
        return {}, clients._replace(offset=np.zeros_like(clients.offset))

    def arranged(self, shards):
        """The clients' records (a list of dicts of [N, ...] arrays, or None) as they are sampled, and their `Rows`, or None
        where each row is a record. Raises InputError."""
        if any(shard is not None and UNIT in shard for shard in shards):
            raise InputError(f"the records have a `{UNIT}`, and privacy_unit=record: give privacy_unit=column:NAME.")
        return shards, None


ROW_EACH = RowEach()


@dataclasses.dataclass(frozen=True)
class Units(RowEach):
    """Records of several rows, of which each brings at most `most` to a step; `cut` says that they have no more than that, being
    texts that were cut."""

    most: int
    cut: bool = False

    @property
    def batches(self):
        """Batches of units."""
        return UnitsOnDevice(self.most)

    def loss(self, of_rows):
        """The mean over the rows that a unit brings."""
        return functools.partial(losses.of_units, of_rows)

    def tokens(self, length):
        """The tokens of the rows that a unit brings."""
        return self.most * length

    def most_rows(self, records):
        """As many as each may have, where they were cut; how many rows a person has knows no bound."""
        return records * self.most if self.cut else None

    def whole(self, records):
        """Each row so many times, as one unit."""
        several = {name: np.repeat(array[:, None], self.most, 1) for name, array in records.items()}
        return several | {BROUGHT: np.ones((len(next(iter(records.values()))), self.most), np.float32)}

    def spread(self, records):
        """Each row so many times, numbered by unit."""
        several = {name: np.repeat(array, self.most, 0) for name, array in records.items()}
        return several | {UNIT: np.repeat(np.arange(len(next(iter(records.values())))), self.most)}

    def on_host(self, rows, clients):
        """The spans of all clients' units together."""
        spans = rows.spans_from([0] * len(rows.spans))
        first, offsets = np.cumsum([0, *map(len, spans)])[:-1], np.zeros_like(clients.offset)
        offsets[: len(first)] = first
        return {SPANS: np.concatenate(spans)}, clients._replace(offset=offsets)

    def arranged(self, shards):
        """The rows in the order of their units, without `unit`, and the `Rows` of the units."""
        if any(shard is not None and UNIT not in shard for shard in shards):
            raise InputError(f"the records have no `{UNIT}`: give each row's unit, or privacy_unit=record.")
        parts = [(None, None, 0) if shard is None else _sorted(shard) for shard in shards]
        rows, spans, counts = map(list, zip(*parts, strict=True))
        return rows, Rows(spans, counts)


def _sorted(shard):
    """A client's rows in the order of their units, without `unit`, its `Rows.spans`, and how many rows there are."""
    _, numbers, count = np.unique(held_out.units_of(shard), return_inverse=True, return_counts=True)
    order = np.argsort(numbers, kind="stable")
    rows = {name: array[order] for name, array in shard.items() if name != UNIT}
    return rows, np.stack([np.cumsum(count) - count, count], 1).astype(np.int32), len(order)


def sizes(rows_of, rows):
    """{client: how many records it has} of what `RowEach.arranged` gave, for the clients that are held here."""
    held = {k: shard for k, shard in enumerate(rows_of) if shard is not None}
    return {k: len(shard["attention_mask"] if rows is None else rows.spans[k]) for k, shard in held.items()}


def layout(config):
    """How the records of a `config` lie in rows."""
    privacy = config.privacy
    return Units(privacy.unit_rows, cut=privacy.unit_column is None) if privacy.by_unit else ROW_EACH
