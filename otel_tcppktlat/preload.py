"""Modules that the exporters import only when they first need them, which may be after the agent has lost the right to.

A test holds that nothing is imported after the privileges are dropped.
"""

import encodings.idna  # noqa: F401  # host names
import linecache  # noqa: F401  # logged exceptions
import netrc  # noqa: F401  # requests, at every request
import stringprep  # noqa: F401
import traceback  # noqa: F401
