"""What each trust mode promises, in words: for `config.json` and the report. PRIVACY.md holds the theorems."""

STATEMENTS = {
    "local": (
        "Everyone may see every upload of every client: the server is honest but curious, and so are the other clients and "
        "the public. Each client's own noise carries its whole guarantee.",
        "What is protected is one record of one client: the outputs are about as likely with that record as with a null record "
        "in its place. Each client has its own epsilon; someone with records at several clients pays for all of them.",
        "Public by assumption: each client's number of records, its sampling rate, batch capacity and weight, the base model, "
        "the configuration, and the test set, whose owner declares it public.",
        "Secret by assumption: each client's 256-bit key. This run simulates all clients on its own hosts, and whoever "
        "controls these sees the records and the keys; the keys are destroyed when the run completes.",
    ),
    "none": (
        "There is NO privacy: no noise is added, and the adapter may reveal the training records. This mode exists as a control.",
    ),
}
