"""What an operator does, whatever the algorithm: loops over slabs, made of an algorithm's operations."""
