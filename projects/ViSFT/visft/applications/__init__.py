"""What the tools do with runs and towers: predict, draw, export, measure, sweep, and the demo."""
