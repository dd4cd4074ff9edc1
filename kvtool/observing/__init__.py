"""What statistics are shown of a model that runs: a forward pass over samples, and a greedy decode of a prompt."""
