"""The demo: an application on top of both packages, therefore the one place here that may import ``mteb_tasks``."""

from __future__ import annotations
