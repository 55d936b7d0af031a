"""What any training repository needs: settings, checkpoints, devices, logging, the cost of a step. Not the method."""
