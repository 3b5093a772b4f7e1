"""The way to the Hugging Face hub: what may go there, and the files that do."""

from dplora_jax.errors import InputError

FOR_RELEASE = "for release"  # a run's own word: description.release


def check(repository, run, release):
    """Raise InputError where an export must not go to the hub's `repository`: `run` is the export.Run, `release` its mark."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    flag = f"--push_to_hub={repository}"
    try:
        validate_repo_id(repository)
    except HFValidationError:
        raise InputError(f"{flag} is not a name of a repository: give NAME/REPO.") from None
    if run is None:
        raise InputError(f"{flag} needs --workdir: only a run's own files tell whether its adapter may be released.")
    if not run.stored.private:
        raise InputError(f"{flag} is refused: the run has no privacy, and its adapter may reveal any record.")
    if release != FOR_RELEASE:
        raise InputError(f"{flag} is refused: {release}.")
    if not run.ended:
        raise InputError(f"{flag} is refused: the run has not ended; run its own command again, which goes on.")


def push(repository, folder, names):
    """Upload the files `names` of `folder`, and no others, in one commit -> a line that says where they are.

    The token is huggingface_hub's own (`hf auth login`, or HF_TOKEN). A new repository is private. Raises InputError.
    """
    import huggingface_hub
    from huggingface_hub import CommitOperationAdd

    hub = huggingface_hub.HfApi()
    try:
        repository_url = hub.create_repo(repository, private=True, exist_ok=True)
        files = [CommitOperationAdd(name.as_posix(), folder / name) for name in names]
        hub.create_commit(repository_url.repo_id, files, commit_message="Upload a LoRA adapter and its model card")
    except Exception as error:  # its clients' errors are many, and their text may hold what was sent
        status = getattr(getattr(error, "response", None), "status_code", None)
        what = f"{type(error).__name__}, status {status}" if status else type(error).__name__
        raise InputError(
            f"--push_to_hub={repository}: the hub did not take the files, which lie in {folder} ({what}): see that you are "
            "logged in (`hf auth login`, or HF_TOKEN) and may write there."
        ) from None
    return (
        f"Uploaded {', '.join(map(str, names))} to {repository_url}. A new repository is private: set `license` in its README.md "
        "before you make it public."
    )
