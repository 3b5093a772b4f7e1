"""What a run needs to go on after it was killed: the state of the rounds and the lines it has shown, saved by orbax."""

import pathlib

import jax
import orbax.checkpoint as ocp


class Checkpoints:
    """The checkpoints of one directory, a step a round; saved asynchronously, the last two kept."""

    def __init__(self, directory):
        options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(pathlib.Path(directory).absolute(), options=options)

    def save(self, number, state, notes):
        """Begin to save `state` (a pytree of arrays) and `notes` (JSON) as of round `number`; `wait` makes sure of it."""
        parts = ocp.args.Composite(state=ocp.args.StandardSave(state), notes=ocp.args.JsonSave(notes))
        self._manager.save(number, args=parts)

    def wait(self):
        """Return when everything saved so far is durable; raises what went wrong."""
        self._manager.wait_until_finished()

    def restore(self, like):
        """The newest whole checkpoint as (round, state, notes), or None; `like` gives shapes, dtypes and shardings."""
        number = self._manager.latest_step()
        if number is None:
            return None
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        parts = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), notes=ocp.args.JsonRestore())
        restored = self._manager.restore(number, args=parts)
        return number, restored["state"], restored["notes"]

    def close(self):
        """Finish pending saves and stop the threads."""
        self._manager.close()
