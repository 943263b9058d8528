"""Plans of an artifact side by side: quality, speed, and how sure both are."""
