"""Panels to play with. Each is a pure computation, a pure picture, and thin controls with plain traits between them."""
