"""What networks learn in equal steps or processor time (`study`), and in a GPU's time (`equal_time`)."""
