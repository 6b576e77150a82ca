"""The demo, and what it shares with the tests; nothing on the normal path imports this."""
