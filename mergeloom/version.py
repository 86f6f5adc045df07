"""The version of mergeloom; every module may import it."""

__version__ = "0.2.0.dev1"
