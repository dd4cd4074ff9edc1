"""What a model costs to serve with the full cache and under a plan, on hardware that need not be here."""
