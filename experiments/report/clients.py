"""The table of the clients in a report: a row a client, or the first ones and the spread of all."""

import statistics

from experiments.text import formats
from experiments.text.tables import Table

CLIENT_COLUMNS = {
    "client": "client",
    "records": "records (n)",
    "sampling_rate": "sampling_rate (q)",
    "capacity": "capacity",
    "noise_multiplier": "noise_multiplier (σ)",
    "epsilon": "epsilon",
    "weight": "weight",
    "rounds": "rounds taken part in",
    "bytes_up": "bytes up a round",
}
VARIED = ("rounds", "bytes_up")  # shown where clients differ
MOST_CLIENTS, FIRST_CLIENTS = 50, 20


def charged(clients, last):
    """The clients with the epsilon that they have spent by the `last` line, in place of the one that was planned."""
    spent = last.get("epsilon", []) if last.get("round") else []
    if len(spent) != len(clients):
        return clients
    return [client | {"epsilon": value} for client, value in zip(clients, spent, strict=True)]


def table(clients, unit="record"):
    """A row a client, or the first ones and the spread of all; `unit` is what is protected, in a word."""
    names = [name for name in CLIENT_COLUMNS if name not in VARIED or len({client.get(name) for client in clients}) > 1]
    rows_shown = clients if len(clients) <= MOST_CLIENTS else clients[:FIRST_CLIENTS]
    body = [
        [_cell(client.get(name), name) if name != "client" else who(client, index) for name in names]
        for index, client in enumerate(rows_shown)
    ]
    foot = []
    for title, reduced in (("min", min), ("median", statistics.median), ("max", max)):
        columns = [[client[name] for client in clients if client.get(name) is not None] for name in names[1:]]
        cells = [
            _cell(reduced(values) if values else None, name) for name, values in zip(names[1:], columns, strict=True)
        ]
        foot.append([title, *cells])
    heads = CLIENT_COLUMNS | {"records": f"{unit}s (n)"}
    return Table([heads[name] for name in names], body, foot if len(rows_shown) < len(clients) else [])


def who(client, index):
    """A client's name, where parties have some, else its number."""
    name = client.get("name")
    return name if isinstance(name, str) else _cell(client.get("client", index), "client")


def _cell(value, name):
    return formats.epsilon(value) if name == "epsilon" else formats.number(value)


def note(clients):
    """What stands below the table where it is not of all clients."""
    if len(clients) <= MOST_CLIENTS:
        return ""
    return f"The first {FIRST_CLIENTS} of {len(clients):,} clients; min, median and max are over all."
