"""Panels to play with: each computes from its controls, draws a picture, and has plain traits in between."""
