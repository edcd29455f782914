"""Foreign implementations: unit and layout conversion happens here only."""
