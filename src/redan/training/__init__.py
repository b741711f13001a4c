"""The one loop that runs any method."""
