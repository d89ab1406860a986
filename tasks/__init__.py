"""The stages as the graph sees them; no torch here."""
