"""What fits a card: `effseg plan`."""
