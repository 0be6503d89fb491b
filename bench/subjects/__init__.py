"""The systems under test: one file a peer, written as that peer's own documentation says."""
