"""What a run will do, and what it did: plans, warnings and replays, all without training."""
