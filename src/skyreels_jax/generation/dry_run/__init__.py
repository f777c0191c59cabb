"""What a generation will take, without making it."""
