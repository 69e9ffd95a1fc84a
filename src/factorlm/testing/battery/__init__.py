"""The parts of ``factorlm.testing.contract``, by subject."""

__all__: list[str] = []
