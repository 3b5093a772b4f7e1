"""The engine NVFLARE: a controller at the coordinator and an executor at each site, which carry bytes and learn nothing.

The controller asks the coordinator's office for the request that waits for a site, sends it to that site's client as a task, and
brings the reply back. The executor asks the site's process over its Unix socket. Both run in an environment that has nvflare and
no JAX, and neither has a setting in a job's configuration: a job comes from outside, and where a socket lies is each party's own
to say, in environment variables.
"""

import json
import os
import pathlib
import threading
import time

from nvflare.apis.controller_spec import Task, TaskCompletionStatus
from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import FLContextKey, ReservedTopic, ReturnCode
from nvflare.apis.impl.controller import Controller
from nvflare.apis.shareable import Shareable
from nvflare.app_common.job_launcher.client_process_launcher import ClientProcessJobLauncher

from dplora_jax.silos import frames, office_socket

SITE_SOCKET = "DPLORA_SITE_SOCKET"  # environment variable: the Unix socket of the site's process
COORDINATOR = "DPLORA_COORDINATOR"  # environment variable: the coordinator's folder, with plan.json and office.sock
TASK, BYTES = "dplora_jax", "bytes"  # a task's name, and where its bytes lie in a Shareable
PAUSE = 1.0  # seconds between attempts to reach a socket
PATIENCE = 30.0  # seconds that a socket may be away: then a reply is left out, or the job ends
BEAT, SILENCE = 10.0, 60.0  # seconds between looks at the clients, and that one may be silent before the job ends
CLIENT_FILE = "config/config_fed_client.json"
FILES = CLIENT_FILE, "config/config_fed_server.json"  # all of a job, which NVFLARE sends to every party
CLIENT = {
    "format_version": 2,
    "executors": [{"tasks": [TASK], "executor": {"path": "dplora_jax.silos.nvflare_relay.SiteRelay", "args": {}}}],
    "components": [],
}
SIGNATURE = ".__nvfl_"  # how the names of a signed job's own files begin


class SiteRelay(Executor):
    """At a site: answers a task with what the site's process replies, or with no bytes where it cannot be reached."""

    def execute(self, task_name, shareable, fl_ctx, abort_signal):
        reply = asked(
            os.environ[SITE_SOCKET], shareable[BYTES], lambda: abort_signal.triggered,
            say=lambda text: self.log_warning(fl_ctx, text),
        )  # fmt: skip
        return Shareable({BYTES: reply or b""})


class OfficeController(Controller):
    """At the coordinator: carries for every site of the plan, until the coordinator's office has gone or the job is aborted.

    It ends the job where a site's process in it has gone, since NVFLARE starts another for a new job alone: submit it again.
    """

    def __init__(self):
        super().__init__()
        folder = pathlib.Path(os.environ[COORDINATOR])
        self.office, self.names = folder / "office.sock", names(folder / "plan.json")

    def start_controller(self, fl_ctx):
        """Nothing is to be prepared."""

    def control_flow(self, abort_signal, fl_ctx):
        """Carry, in a thread for each site."""
        ended = threading.Event()
        threading.Thread(target=self._watch, args=(ended,), daemon=True).start()
        threads = [
            threading.Thread(target=self._carry, args=(number, name, abort_signal), daemon=True)
            for number, name in enumerate(self.names)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        ended.set()

    def stop_controller(self, fl_ctx):
        """Nothing is left to be done."""

    def _carry(self, number, name, abort_signal):
        with self._engine.new_context() as fl_ctx:

            def ask(request):
                return self._answer(name, request, abort_signal, fl_ctx)

            def say(text):
                self.log_warning(fl_ctx, text)

            office_socket.carry(self.office, number, ask, lambda: abort_signal.triggered, PATIENCE, say)

    def _answer(self, name, request, abort_signal, fl_ctx):
        """What the site of that name replies to `request`; b"" where its client has gone or the job is aborted."""
        replies = []

        def received(client_task, fl_ctx):
            replies.append(client_task.result.get(BYTES, b""))
            client_task.result = None  # no copy is kept in the job's state

        task = Task(TASK, Shareable({BYTES: request}), result_received_cb=received)
        self.send_and_wait(task, fl_ctx, targets=[name], abort_signal=abort_signal)
        return replies[0] if replies and task.completion_status == TaskCompletionStatus.OK else b""

    def _watch(self, ended):
        """End the job when a site's process in it has been silent for SILENCE seconds: NVFLARE itself does not notice where the
        client was started again."""
        heard = dict.fromkeys(self.names, time.monotonic())
        while not ended.wait(BEAT):
            with self._engine.new_context() as fl_ctx:
                replies = self._engine.send_aux_request(
                    self.names, ReservedTopic.JOB_HEART_BEAT, Shareable(), BEAT, fl_ctx, optional=True
                )
                for name, reply in (replies or {}).items():
                    if reply.get_return_code() == ReturnCode.OK:
                        heard[name] = time.monotonic()
                silent = [name for name in self.names if time.monotonic() - heard[name] > SILENCE]
                if silent:
                    self.system_panic(f"the client of {silent[0]} has gone: submit the job again", fl_ctx)
                    return


class SiteLauncher(ClientProcessJobLauncher):
    """At a site, in its own resources.json: starts a job's process where the job's files at this site are a configuration that
    names SiteRelay, and nothing else. It does not go by who submitted the job, which the server says."""

    def launch_job(self, job_meta, fl_ctx):
        workspace = fl_ctx.get_prop(FLContextKey.WORKSPACE_OBJECT)
        refuse(workspace.get_app_dir(job_meta["job_id"]))
        return super().launch_job(job_meta, fl_ctx)


def refuse(folder):
    """Raise PermissionError where `folder`, a job's files at a site, holds more than two configurations, or another for the site
    than that of SiteRelay."""
    folder = pathlib.Path(folder)
    files = [path for path in folder.rglob("*") if not path.is_dir() and not path.name.startswith(SIGNATURE)]
    extra = sorted({str(path.relative_to(folder)) for path in files} - {*FILES})
    if extra:
        raise PermissionError(f"the job has files of its own: {extra[0]}")
    if json.loads((folder / CLIENT_FILE).read_text()) != CLIENT:
        raise PermissionError("the job's configuration is another than this site runs")


def names(plan):
    """The sites' names in the file `plan`, in the order of their numbers."""
    return [site["name"] for site in json.loads(pathlib.Path(plan).read_text())["plan"]["sites"]]


def asked(path, data, stop, say):
    """What the site's Unix socket `path` answers to `data`; None where it cannot be reached within PATIENCE seconds, or
    `stop()`."""
    failing_since = None
    while not stop():
        try:
            return frames.ask(path, data, office_socket.MOST)
        except OSError as error:
            now = time.monotonic()
            failing_since = failing_since or now
            if now - failing_since > PATIENCE:
                return None
            say(f"{path}: trying again ({type(error).__name__}: {error.strerror or error})")
            time.sleep(PAUSE)
    return None
