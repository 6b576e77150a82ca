"""The loader: a short-lived privileged process, the only part that knows bcc. Standard library and bcc only, Python 3.9+."""
