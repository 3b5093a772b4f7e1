"""Parties that share no machine. Each runs a `site` process on its own machine, which owns its text, its secret and its ledger; a
`coordinator` sums what they send and steps; an engine carries bytes between them and learns nothing.

What travels has one shape: `messages` of fixed size, signed, down a global adapter and up an adapter's noisy change, or integers
under `masks`. The `plan`, which every party checked and signed, says all that is public. Only `site` needs JAX.

Letters: K sites, D numbers of the adapter.
"""
