"""The engine over Flower: a ServerApp beside the coordinator, and a ClientApp beside each site, which carry bytes alone.

Both are installed before a run; the app that Flower ships is a configuration that names them (launch/flower). A node is the
site whose name its key was registered under. No JAX, and nothing of Flower's but its messages: no strategy, and no SecAgg+.
"""

import functools
import threading
import time

from flwr.app import Array, ArrayRecord, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from dplora_jax.silos import frames, office_socket

KEY = "bytes"
CHECK = 0.5  # seconds between looks for a reply
NODES = 5.0  # seconds between looks for new nodes
LONGEST = 24 * 3600.0  # seconds after which a message that got lost unnoticed is sent again

client = ClientApp()
server = ServerApp()  # on lines of their own: Flower reads this file for the two names


def pack(data):
    """A message's content that holds the bytes `data`; Flower sends it in chunks."""
    return RecordDict({KEY: ArrayRecord({KEY: Array("uint8", (len(data),), "bytes", data)})})


def unpack(message):
    """The bytes in a message; b"" where it is an error of Flower's, whose text nobody reads."""
    return message.content[KEY][KEY].data if message.has_content() else b""


@client.train()
def answer(message, context):
    """What the site's process answers, at the Unix socket that the node's configuration names; nothing where it is away. An
    error's text would go to the server, so none is raised."""
    try:
        reply = frames.ask(context.node_config["socket"], unpack(message), office_socket.MOST)
    except Exception:
        reply = b""
    return Message(pack(reply), reply_to=message)


@server.main()
def relay(grid, context):
    """Carry requests and replies between the office and every node of a site's name, until the run is stopped. Raises what
    Flower raises where its SuperLink is gone."""
    sites, known, link = context.run_config["sites"].split(","), set(), Link(grid)
    while True:
        for node, (name, _) in link.nodes().items():
            if node not in known and name in sites:
                known.add(node)
                ask = functools.partial(link.ask, node)
                arguments = context.run_config["office"], sites.index(name), ask
                threading.Thread(target=office_socket.carry, args=arguments, daemon=True).start()
        time.sleep(NODES)


class Link:
    """A Grid of Flower's for several threads, of which one at a time uses it."""

    def __init__(self, grid):
        self._grid, self._lock = grid, threading.Lock()

    def nodes(self):
        """{number: (name, when it came)} of the nodes that are there."""
        with self._lock:
            return {node.node_id: (node.name, node.last_activated_at) for node in self._grid.get_nodes()}

    def ask(self, node, request):
        """What `node` replies to `request`; b"" where it is away, or came again since and forgot, or Flower failed."""
        try:
            before = self.nodes().get(node)
            sent = self._send(node, request) if before else []
            while sent and self.nodes().get(node) == before:
                with self._lock:
                    replies = list(self._grid.pull_messages(sent))
                if replies:
                    return unpack(replies[0])
                time.sleep(CHECK)
        except Exception:  # also of the SuperLink, whose end `relay` sees
            pass
        return b""

    def _send(self, node, request):
        message = Message(pack(request), node, MessageType.TRAIN, ttl=LONGEST)
        with self._lock:
            return list(self._grid.push_messages([message]))
