"""What a student starts from, and how much each of its samples counts."""
