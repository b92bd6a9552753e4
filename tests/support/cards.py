"""Compute capabilities of cards, for tests without one."""

CARDS = {
    "Turing": (7, 5), "Ampere": (8, 0), "GeForce 30": (8, 6), "Ada": (8, 9), "Hopper": (9, 0),
    "Blackwell": (10, 0), "GeForce 50": (12, 0), "a later card": (13, 7),
}  # fmt: skip
