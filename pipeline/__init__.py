"""From a recipe to a checked, measured and packed model, and the report of how it went."""
