"""What a head does with its attention, summed while it attends: columns, distances, entropy. Never an n×n tensor
in the twins."""
