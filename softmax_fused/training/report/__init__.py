"""What the lab shows of runs and data: console output, figures, TensorBoard events and an HTML page."""
