"""The programs that one runs: each reads flags or a workdir, and leaves files."""
