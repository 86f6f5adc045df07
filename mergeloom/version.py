"""The version of mergeloom. Every module may import it."""

__version__ = "0.2.0.dev1"
