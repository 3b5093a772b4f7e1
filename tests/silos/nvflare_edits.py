"""What somebody may have changed of launch/nvflare: code of one's own, classes that are not listed, logs that are sent."""

import json
import pathlib
import shutil

FILES = pathlib.Path(__file__).parents[2] / "launch" / "nvflare"
PLAIN_LAUNCHER = "nvflare.app_common.job_launcher.client_process_launcher.ClientProcessJobLauncher"


def copied(tmp_path, edit):
    """launch/nvflare, of which `edit(folder)` changed something."""
    shutil.copytree(FILES, tmp_path / "files")
    edit(tmp_path / "files")
    return tmp_path / "files"


def replaced(path, *pairs):
    text = path.read_text()
    for old, new in pairs:
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)


def any_server(files):
    """A coordinator that allows itself everything: what a site refuses, it refuses itself."""
    replaced(files / "server" / "authorization.json", ('"none"', '"any"'))
    replaced(files / "server" / "resources.json", ("dplora_jax.silos.nvflare_relay.OfficeController", "*"))


def own_code(files):
    any_server(files)
    (files / "job" / "app" / "custom").mkdir()
    (files / "job" / "app" / "custom" / "own.py").write_text("")


def own_code_of_a_super_user(files):
    """NVFLARE 2.9 lets a role of this name do everything, past every site's policy."""
    own_code(files)
    replaced(files / "project.yml", ("role: project_admin", "role: super"))


def other_class(files):
    any_server(files)
    replaced(
        files / "job" / "app" / "config" / "config_fed_client.json",
        ("dplora_jax.silos.nvflare_relay.SiteRelay", "nvflare.app_common.np.np_trainer.NPTrainer"),
    )


def other_class_without_launcher(files):
    other_class(files)
    replaced(
        files / "site" / "resources.json",
        ("dplora_jax.silos.nvflare_relay.SiteLauncher", PLAIN_LAUNCHER),
    )


def uploading(files):
    """NVFLARE's own default: logs of jobs go to the server."""
    site, server = files / "site" / "resources.json", files / "server" / "resources.json"
    streamer = {
        "id": "site_log_streamer", "path": "nvflare.app_common.logging.site_log_streamer.SiteLogStreamer",
        "args": {"log_file_name": "error_log.txt"},
    }  # fmt: skip
    for path, component in (
        (site, streamer),
        (server, {"id": "log_receiver", "path": "nvflare.app_common.logging.job_log_receiver.JobLogReceiver"}),
    ):
        resources = json.loads(path.read_text())
        resources["components"].append(component)
        resources["class_allow_list"] = ["*"]
        path.write_text(json.dumps(resources))
    replaced(
        site,
        ('"allow_log_streaming": false', '"allow_log_streaming": true'),
        ("dplora_jax.silos.nvflare_relay.SiteLauncher", PLAIN_LAUNCHER),
    )
