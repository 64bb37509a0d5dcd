"""Sources of interactions and item texts, one schema, user splits and frozen re-ranking lists."""
