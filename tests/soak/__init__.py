"""A long run; `python -m tests.soak` starts it."""
