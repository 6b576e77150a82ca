"""The loader: a short-lived privileged process, the only part that knows bcc.

It runs under the distribution's Python (3.9 or later), with the standard library and bcc only.
"""
