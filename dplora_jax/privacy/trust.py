"""What each trust mode promises, in words: for `config.json` and the report. PRIVACY.md holds the theorems."""

RECORD = (
    "What is protected: one record of one client. What is seen is about as likely with that record as with a null record in its "
    "place. Each client has its own epsilon; someone with records at several clients pays for all of them."
)
PUBLIC = (
    "Public by assumption: each client's number of records, its sampling rate and batch capacity, the base model, the "
    "configuration, and the test set, whose owner declares it public."
)
HOSTS = (
    "This run simulates all parties on its own hosts, and whoever controls these sees the records and the keys; the keys are "
    "destroyed when the run completes."
)

LOCAL = (
    "Who sees what: everyone may see every upload of every client. The server is honest but curious, and so are the other "
    "clients and the public. Each client's own noise carries its whole guarantee.",
    RECORD,
    PUBLIC,
    f"Secret by assumption: each client's 256-bit key. {HOSTS}",
)

NONE = (
    "There is NO privacy: no noise is added, and the adapter may reveal the training records. This mode exists as a control.",
)


def distributed(clients, survivors, colluding):
    """Mode `distributed` in words: `colluding` of at least `survivors` of `clients` tell what they know."""
    h = survivors - colluding
    return (
        "Who sees what: the server, the clients and the public see each round's TOTAL of the clients' noisy sums, and no "
        "client's own upload. Secure aggregation is SIMULATED here by a sum inside the program: a deployment needs a real "
        "protocol, for one client's upload alone carries too little noise.",
        RECORD,
        f"What is assumed: of {clients} clients at least {survivors} send their sum, or the round is void. At most {colluding} "
        "collude with the server and tell their own noise (one who is merely curious knows its own). The others, at least "
        f"h = {survivors} - {colluding} = {h}, each add Gaussian noise of variance sigma^2 C^2 / {h}, as they should. Whether a "
        "client sends depends on no record.",
        PUBLIC,
        f"Secret by assumption: the honest clients' 256-bit keys. {HOSTS}",
    )


def client(clients, rate):
    """Mode `client` in words: each of `clients` takes part in a round with probability `rate`."""
    return (
        "Who sees what: the server is TRUSTED and sees every client's update. The other clients and the public see only each "
        "round's adapter, after the server's noise, and not who took part.",
        "What is protected: one client with all its records, however many. What is seen is about as likely with that client as "
        f"with a null client, whose update is zero, in its place. All {clients} clients have the same epsilon.",
        "What is assumed: the server clips each whole update, weighs all alike, adds the noise and keeps its key. Each client "
        f"takes part in a round independently with probability {rate:g}, and only the server sees whether it did.",
        "Public by assumption: how many clients there are and how many records each has (no weight follows from it), the base "
        "model, the configuration, and the test set, whose owner declares it public.",
        f"Secret by assumption: the server's and the clients' 256-bit keys. {HOSTS}",
    )
