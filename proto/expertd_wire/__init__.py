"""The wire contract of expertd: messages, codec, dtype table, error reasons. Pure: no torch."""
