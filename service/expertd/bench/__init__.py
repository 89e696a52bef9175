"""The load that `expertd bench` puts on a server; a client like any other, without torch."""
