"""Plans to compare, what was measured of them, and the bench that runs them."""
