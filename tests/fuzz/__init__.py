"""Whatever bytes a client or a server sends: what must hold, what sends such bytes, and who looks."""
