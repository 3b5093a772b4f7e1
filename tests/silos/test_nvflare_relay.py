"""NVFLARE's relays over stand-ins for its classes, and the files that a site is given."""

import importlib
import json
import pathlib
import shutil
import subprocess
import sys
import types

import pytest

from dplora_jax.silos import frames

ROOT = pathlib.Path(__file__).parents[2]
FILES = ROOT / "launch" / "nvflare"


WITHOUT_JAX = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("jax", "jaxlib", "flax", "numpy", "cryptography", "absl"):
            raise ImportError(name)
sys.meta_path.insert(0, Blocker())
"""


STAND_INS = {
    "nvflare.apis.controller_spec": {"Task": object, "TaskCompletionStatus": object},
    "nvflare.apis.executor": {"Executor": object},
    "nvflare.apis.fl_constant": {"FLContextKey": object, "ReservedTopic": object, "ReturnCode": object},
    "nvflare.apis.impl.controller": {"Controller": object},
    "nvflare.apis.shareable": {"Shareable": dict},
    "nvflare.app_common.job_launcher.client_process_launcher": {"ClientProcessJobLauncher": object},
}


@pytest.fixture
def relay(monkeypatch):
    """The module `nvflare_relay` over stand-ins for nvflare's classes, impatient."""
    for name, members in STAND_INS.items():
        parts = name.split(".")
        for count in range(1, len(parts) + 1):
            monkeypatch.setitem(sys.modules, ".".join(parts[:count]), types.ModuleType(".".join(parts[:count])))
        vars(sys.modules[name]).update(members)
    monkeypatch.delitem(sys.modules, "dplora_jax.silos.nvflare_relay", raising=False)
    module = importlib.import_module("dplora_jax.silos.nvflare_relay")
    monkeypatch.setattr(module, "PAUSE", 0.01)
    monkeypatch.setattr(module, "PATIENCE", 0.05)
    yield module
    sys.modules.pop("dplora_jax.silos.nvflare_relay")


def test_the_relay_needs_no_package_of_this_project_but_its_own_frames():
    stand_ins = "".join(
        f"sys.modules[{name!r}] = type(sys)({name!r}); vars(sys.modules[{name!r}]).update({list(members)!r} and "
        f"dict.fromkeys({list(members)!r}, object))\n"
        for name, members in STAND_INS.items()
    )
    code = f"{WITHOUT_JAX}{stand_ins}import dplora_jax.silos.nvflare_relay\n" + (
        "print(sorted(name for name in sys.modules if name.startswith('dplora_jax')))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    own = ["frames", "nvflare_relay", "office_socket"]
    expected = ["dplora_jax", "dplora_jax.silos", *(f"dplora_jax.silos.{name}" for name in own)]
    assert done.stdout.strip() == str(expected)


def test_a_relay_answers_nothing_for_a_site_that_is_away(relay, tmp_path, monkeypatch):
    told, site = [], relay.SiteRelay()
    site.log_warning = lambda context, text: told.append(text)
    monkeypatch.setenv(relay.SITE_SOCKET, str(tmp_path / "site.sock"))
    signal_ = types.SimpleNamespace(triggered=False)
    assert site.execute(relay.TASK, {relay.BYTES: b"request"}, None, signal_) == {relay.BYTES: b""}
    with frames.listening(tmp_path / "site.sock", lambda data: b"reply to " + data, 1 << 10):
        assert site.execute(relay.TASK, {relay.BYTES: b"request"}, None, signal_) == {relay.BYTES: b"reply to request"}


def test_a_site_starts_the_job_of_this_project_and_no_other(relay, tmp_path):
    shutil.copytree(FILES / "job" / "app", tmp_path / "app")
    (tmp_path / "app" / "config" / ".__nvfl_sig.json").write_text("{}")
    relay.refuse(tmp_path / "app")
    (tmp_path / "app" / "custom").mkdir()
    (tmp_path / "app" / "custom" / "own.py").write_text("")
    with pytest.raises(PermissionError, match=r"files of its own: custom/own\.py"):
        relay.refuse(tmp_path / "app")
    (tmp_path / "app" / "custom" / "own.py").unlink()
    config = tmp_path / "app" / relay.CLIENT_FILE
    config.write_text(config.read_text().replace("SiteRelay", "OfficeController"))
    with pytest.raises(PermissionError, match="another than this site runs"):
        relay.refuse(tmp_path / "app")


def test_a_sites_files_allow_one_class_and_nobodys_code_or_commands_and_upload_no_log():
    resources = json.loads((FILES / "site" / "resources.json").read_text())
    rights = json.loads((FILES / "site" / "authorization.json").read_text())["permissions"]
    assert resources["class_allow_list"] == ["dplora_jax.silos.nvflare_relay.SiteRelay"]
    assert resources["class_list_enforcement_mode"] == "enforce"
    assert resources["allow_log_streaming"] is False
    assert "Streamer" not in json.dumps(resources["components"])
    assert list(rights) == ["project_admin"]
    allowed = {name for name, who in rights["project_admin"].items() if who != "none"}
    assert allowed == {"submit_job", "manage_job", "check_status"}
