"""Test-time training with large chunks: tasks that show what it remembers."""
