"""The Tokyo Tyrant wire, a client for it and a server of it."""
