"""Attacks on the training program and on released adapters: canaries, membership inference, memorised secrets."""
