"""What the lab shows: lines and bars, figures, TensorBoard events, and an HTML page."""
