"""Tools for tests of factorlm and of structures that others add; nothing else imports them."""

__all__: list[str] = []
