"""Small questions about one row and one call; each yields every fault it finds."""
