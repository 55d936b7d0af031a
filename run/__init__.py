"""What any training repository needs: settings, checkpoints, devices, logging, what a step costs. Nothing of the method."""
