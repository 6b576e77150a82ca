"""The demo that `make run` shows, and the embedded OTLP receiver that it shares with the tests."""
