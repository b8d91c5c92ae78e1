"""What is kept on disk: entries by what they depend on, written as data."""
