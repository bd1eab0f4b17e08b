"""The training room: numerics, quantised units, the coding objective, data, models and the loop."""
