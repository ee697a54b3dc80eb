"""The version, in its one place: pyproject.toml and the extension's build info read it from here."""

__version__ = "0.1.0"
