"""What many packages here need, and none of them owns."""
